"""Latent diffusion models that are told more than one thing: inpainting, depth, upscaling, image embeddings, layouts.

Each states, in `more_conditions`, what it adds to the dict that DiffusionWrapper takes. YAML and public code find these
classes in `ldm.models.diffusion.ddpm`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import ConfigError
from ldm.models.diffusion.ddpm import DDPM, RESTART_KEYS, LatentDiffusion
from ldm.modules.midas.api import fit_depth

# The first convolution, and its EMA copy: what has to grow when input channels are added to a trained model.
FIRST_CONVOLUTION = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)


class ManyConditions(LatentDiffusion):
    """A latent diffusion model whose condition is a dict: c_crossattn from its cond stage, and more from the batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.cond_stage_trainable:
            raise ConfigError(f"{type(self).__name__} cannot train its cond stage; set cond_stage_trainable: false")

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        """What to give DiffusionWrapper beside c_crossattn, for the entries of the batch that are in z (b, c, h, w)."""
        raise NotImplementedError

    def image(self, batch: Mapping, key: str, like: Tensor) -> Tensor:
        """Images (b, h, w, c) of a batch as (b, c, h, w), as many as `like` has, and where it lies."""
        return DDPM.get_input(self, batch, key)[:len(like)].to(like.device)

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping,
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
        **kwargs,
    ) -> list:
        """[z, conditions], and with return_first_stage_outputs also images, reconstructions and the raw condition."""
        kwargs = {"return_original_cond": return_first_stage_outputs, **kwargs, "force_c_encode": True}
        z, c, *rest = super().get_input(
            batch, k, return_first_stage_outputs=return_first_stage_outputs, cond_key=cond_key, bs=bs, **kwargs
        )
        return [z, {"c_crossattn": [c], **self.more_conditions(batch, z)}, *rest]


class LatentFinetuneDiffusion(ManyConditions):
    """The base of models that begin with the weights of one with fewer input channels.

    Of the weights named in finetune_keys, the first keep_finetune_dims input channels come from the checkpoint and the
    others begin at zero. c_concat_log_start:end are the channels of c_concat that are latents to decode for the log.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        **kwargs,
    ):
        restart = {key: kwargs.pop(key) for key in RESTART_KEYS if key in kwargs}
        super().__init__(**kwargs)
        self.concat_keys = tuple(concat_keys)
        self.finetune_keys = tuple(finetune_keys or ())
        self.keep_dims = keep_finetune_dims
        self.c_concat_log_start = c_concat_log_start
        self.c_concat_log_end = c_concat_log_end
        self.restart(**restart)

    def adapted(self, key: str, weight: Tensor, shape: torch.Size) -> Tensor:
        if key not in self.finetune_keys or weight.shape == shape:
            return super().adapted(key, weight, shape)
        grown = weight.new_zeros(shape)
        grown[:, :self.keep_dims] = weight[:, :self.keep_dims]
        return grown

    def condition_images(self, batch: Mapping, c: Mapping, raw, x: Tensor) -> dict[str, Tensor]:
        pictures = super().condition_images(batch, c, raw, x)
        if self.c_concat_log_start is not None:
            latents = c["c_concat"][0][:, self.c_concat_log_start:self.c_concat_log_end]
            pictures["c_concat_decoded"] = self.decode_first_stage(latents)
        return pictures


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Fills the masked part of an image: c_concat is the mask and the latents of the image without that part.

    batch: `mask` (b, h, w, 1), 1 where to fill, and `masked_image` (b, h, w, 3) in [-1, 1].
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        **kwargs,
    ):
        super().__init__(concat_keys=concat_keys, **kwargs)
        if masked_image_key not in self.concat_keys:
            raise ConfigError(f"masked_image_key must be one of {self.concat_keys}, got {masked_image_key!r}")
        self.masked_image_key = masked_image_key

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        def condition(key: str) -> Tensor:
            image = self.image(batch, key, z)
            if key == self.masked_image_key:
                return self.get_first_stage_encoding(self.encode_first_stage(image))
            return F.interpolate(image, size=z.shape[-2:])

        return {"c_concat": [torch.cat([condition(key) for key in self.concat_keys], dim=1)]}

    def condition_images(self, batch: Mapping, c: Mapping, raw, x: Tensor) -> dict[str, Tensor]:
        masked = {"masked_image": self.image(batch, self.masked_image_key, x)}
        return super().condition_images(batch, c, raw, x) | masked


class LatentEditDiffusion(ManyConditions):
    """Edits an image as a text says (Brooks et al. 2023): c_concat is the latents of the image, unscaled.

    batch: batch[cond_stage_key] holds `c_crossattn`, texts, and `c_concat`, images (b, h, w, 3) in [-1, 1]. Training
    drops the text alone, the image alone and both with a probability of 5 % each, for two guidances (sec. 3.2.1).
    """

    dropped = 0.05

    @torch.no_grad()
    def get_input(self, batch: Mapping, k: str, *args, **kwargs) -> list:
        z, c, *rest = super().get_input(batch, k, *args, **kwargs)
        if self.training:
            chance = torch.rand(len(z), 1, 1, device=z.device) / self.dropped
            text, image = c["c_crossattn"][0], c["c_concat"][0]
            text = torch.where(chance < 2, self.get_learned_conditioning([""]), text)
            image = image * ((chance < 1) | (chance >= 3))[..., None]
            c = {"c_crossattn": [text], "c_concat": [image]}
        return [z, c, *rest]

    def raw_condition(self, batch: Mapping, key: str, x: Tensor):
        return batch[key]["c_crossattn"]

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        posterior = self.encode_first_stage(self.image(batch[self.cond_stage_key], "c_concat", z))
        return {"c_concat": [posterior if isinstance(posterior, Tensor) else posterior.mode()]}


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Keeps the depth of an image: c_concat is what depth_model says of batch["midas_in"] (b, 3, h, w), in [-1, 1]."""

    def __init__(self, depth_stage_config: Mapping, concat_keys: Sequence[str] = ("midas_in",), **kwargs):
        super().__init__(concat_keys=concat_keys, extra_stages={"depth_model": depth_stage_config}, **kwargs)
        self.depth_stage_key = self.concat_keys[0]

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        depth = self.depth_model(batch[self.depth_stage_key][:len(z)].to(z.device))
        return {"c_concat": [fit_depth(depth, z.shape[-2:], margin=0.001)]}

    def condition_images(self, batch: Mapping, c: Mapping, raw, x: Tensor) -> dict[str, Tensor]:
        return super().condition_images(batch, c, raw, x) | {"depth": c["c_concat"][0]}


class LatentUpscaleDiffusion(ManyConditions):
    """Adds detail to a small image: c_concat is batch[low_scale_key], noised to the level that c_adm tells.

    low_scale_model(x, level=None) -> (noised x, level (b,)).
    """

    def __init__(
        self,
        *args,
        low_scale_config: Mapping,
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs,
    ):
        if noise_level_key is not None:
            raise ConfigError("noise_level_key was never released by Stability AI; remove it: the level is drawn")
        super().__init__(*args, extra_stages={"low_scale_model": low_scale_config}, **kwargs)
        self.low_scale_key = low_scale_key

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        noised, level = self.low_scale_model(self.image(batch, self.low_scale_key, z))
        return {"c_concat": [noised], "c_adm": level}

    def condition_images(self, batch: Mapping, c: Mapping, raw, x: Tensor) -> dict[str, Tensor]:
        return super().condition_images(batch, c, raw, x) | {"x_lr": self.image(batch, self.low_scale_key, x)}


class LatentUpscaleDepthDiffusion(ManyConditions):
    """Adds detail to a picture with depth (Stan et al. 2023, LDM3D-SR): c_concat is its latents, resized by `enlarges`.

    batch[low_scale_key]: (b, h, w, 4) in [-1, 1], the colours and the depth, resized to the pictures that are learnt.
    """

    def __init__(self, *args, enlarges: int = 2, low_scale_key: str = "LR", **kwargs):
        super().__init__(*args, **kwargs)
        self.enlarges = enlarges
        self.low_scale_key = low_scale_key

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        posterior = self.encode_first_stage(self.image(batch, self.low_scale_key, z))
        return {"c_concat": [self.get_first_stage_encoding(posterior)]}


class LatentUpscale2xDiffusion(LatentDiffusion):
    """Doubles the sides of a latent: c_concat is the small one at the size of z, the network one of k-diffusion.

    The network F is told log(sigma) / 4, and alpha x + sigma F is x0 (Karras et al. 2022, table 1, with sigma_data 1):
    -F is v. Its last channel, a variance, is not used. The cond stage gives the states of a text and one for the whole.
    """

    def __init__(self, *args, enlarges: int = 2, **kwargs):
        super().__init__(*args, **kwargs)
        if self.parameterization != "v":
            raise ConfigError(f"parameterization must be v, got {self.parameterization!r}")
        self.enlarges = enlarges

    def log_sigma(self, t: Tensor) -> Tensor:
        """log(sigma / alpha) at the timesteps (b,), linear between trained ones, as `ldm.sampling.Schedule` has it."""
        table = 0.5 * (torch.log1p(-self.alphas_cumprod) - self.alphas_cumprod.log())
        below = t.long()
        return torch.lerp(table[below], table[(below + 1).clamp(max=len(table) - 1)], (t - below).float())

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping, return_ids: bool = False) -> Tensor:
        chunks = cond["c_crossattn"][0].unflatten(1, (-1, self.cond_stage_model.max_length + 1))
        states, whole = chunks[:, :, :-1].flatten(1, 2), chunks[:, 0, -1]
        clean = whole.new_zeros(len(whole), self.model.diffusion_model.cond_channels - whole.shape[1])
        clean[:, :clean.shape[1] // 2] = 1  # cos and sin of 0, the noise in the small latent
        out = self.model(x_noisy, self.log_sigma(t) / 4, cond["c_concat"], [states], torch.cat([clean, whole], dim=1))
        return -out[:, :self.channels]


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Begins with a text-to-image model and learns to follow a small image, folded into patches if it is too large.

    reshuffle_patch_size p: (b, c, p h, p w) -> (b, p p c, h, w).
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping | None = None,
        low_scale_key: str | None = None,
        **kwargs,
    ):
        super().__init__(concat_keys=concat_keys, extra_stages={"low_scale_model": low_scale_config}, **kwargs)
        self.reshuffle_patch_size = reshuffle_patch_size
        self.low_scale_key = low_scale_key

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        images = [self.image(batch, key, z) for key in self.concat_keys]
        if self.reshuffle_patch_size is not None:
            p = self.reshuffle_patch_size
            # The patch number is the slow channel axis and the patch grid the fast spatial one: not pixel_unshuffle.
            images = [x.unflatten(3, (p, -1)).unflatten(2, (p, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 3)
                      for x in images]  # fmt: skip
        image = torch.cat(images, dim=1)
        if self.low_scale_model is None:
            return {"c_concat": [image]}
        noised, level = self.low_scale_model(image)
        return {"c_concat": [noised], "c_adm": level}


class ImageEmbeddingConditionedLatentDiffusion(ManyConditions):
    """Follows the embedding of an image, c_adm (b, d), which training drops with probability embedding_dropout.

    noise_aug_config: a model (embedding, noise_level=None, noise=None) -> (noised embedding, embedding of the noise
    level), both joined to c_adm.
    """

    def __init__(
        self,
        embedder_config: Mapping,
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Mapping | None = None,
        **kwargs,
    ):
        stages = {"embedder": embedder_config, "noise_augmentor": noise_aug_config}
        super().__init__(extra_stages=stages, **kwargs)
        if not freeze_embedder:
            raise ConfigError("no released code trains the embedder; set freeze_embedder: true")
        self.embed_key = embedding_key
        self.embedding_dropout = embedding_dropout

    def augment(self, embedding: Tensor, **noise: Tensor) -> Tensor:
        """c_adm for embeddings (b, d). noise: its `noise_level` (b,) and the `noise` itself (b, d), else drawn."""
        if self.noise_augmentor is None:
            return embedding
        return torch.cat(self.noise_augmentor(embedding, **noise), dim=1)

    def more_conditions(self, batch: Mapping, z: Tensor) -> dict:
        embedding = self.augment(self.embedder(self.image(batch, self.embed_key, z)))
        if self.training:
            kept = torch.rand(len(embedding), 1, device=embedding.device) >= self.embedding_dropout
            embedding = embedding * kept
        return {"c_adm": embedding}


class Layout2ImgDiffusion(LatentDiffusion):
    """Draws objects in given boxes: batch["coordinates_bbox"] (b, n) holds the layout as tokens."""

    def __init__(self, cond_stage_key: str, *args, **kwargs):
        if cond_stage_key != "coordinates_bbox":
            raise ConfigError(f"Layout2ImgDiffusion needs cond_stage_key coordinates_bbox, got {cond_stage_key!r}")
        super().__init__(*args, cond_stage_key=cond_stage_key, **kwargs)

    def condition_images(self, batch: Mapping, c, raw, x: Tensor) -> dict[str, Tensor]:
        """The boxes, as the data set's own conditional builder plots them."""
        data = self.trainer.datamodule.datasets["train" if self.training else "validation"]
        builder = data.conditional_builders[self.cond_stage_key]

        def label(category: int) -> str:
            return data.get_textual_label(data.get_category_id(category))

        layouts = batch[self.cond_stage_key][:len(x)]
        boxes = [builder.plot(layout.detach().cpu(), label, tuple(x.shape[2:])) for layout in layouts]
        return {"bbox_image": torch.stack(boxes)}
