"""First stages: autoencoders between pictures (b, c, h, w) in [-1, 1] and the latents that diffusion works on."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import read_checkpoint
from ldm.checkpoint.diffusers import NETWORKS
from ldm.models.base import Module
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.vqvae import VectorQuantizer
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)


class Autoencoder(Module):
    """What both autoencoders share: the networks, checkpoints, EMA, and training against a discriminator.

    `lossconfig` names a module that is called as those of `ldm.modules.losses` are; for inference, Identity will do.
    Two optimizers take turns on each batch, so that Lightning counts two steps for it; or there is one alone, where the
    loss has no discriminator. `learning_rate` and `accumulate_grad_batches` are set from outside: Lightning itself
    cannot accumulate for more than one optimizer.
    """

    accumulate_grad_batches = 1

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        moments: int,
        image_key: str,
        colorize_nlabels: int | None,
        monitor: str | None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.turns = 1 if getattr(self.loss, "discriminator", self.loss) is None else 2
        self.quant_conv = nn.Conv2d(moments * ddconfig["z_channels"], moments * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.use_ema = False
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    def init_ema(self, **options: Any) -> None:
        """Keep an average of the weights from here on."""
        self.use_ema = True
        self.model_ema = LitEma(self, **options)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load the weights of a checkpoint, its own or a diffusion model's, of which the first stage is taken.

        Keys that start with one of `ignore_keys` are left out.
        """
        state = read_checkpoint(path)
        part = NETWORKS["vae"]
        inner = {key.removeprefix(part): w for key, w in state.items() if key.startswith(part)}
        state = {key: w for key, w in (inner or state).items() if not key.startswith(tuple(ignore_keys))}
        on_meta = self.quant_conv.weight.is_meta
        if on_meta:  # the weights become the module's own, so they must leave the mapped file
            state = {key: weight.clone() for key, weight in state.items()}
        missing, unexpected = self.load_state_dict(state, strict=False, assign=on_meta)
        logger.info("restored from %s", path)
        if missing or unexpected:
            logger.warning("%s lacks %s and has unknown %s", path, missing or "nothing", unexpected or "nothing")

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Work with the averaged weights inside of the block; nothing changes in a model that keeps none."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.parameters())
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(self.parameters())

    def _features(self, x: Tensor) -> Tensor:
        """The encoder's last word on pictures x: computed in the dtype of the weights, given in float32."""
        return self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype))).float()

    def _picture(self, z: Tensor) -> Tensor:
        """The picture of a latent z: computed in the dtype of the weights, given in float32."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))).float()

    # ----------------------------------------------------------------------------------------------------- training

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """The pictures of a batch, (b, h, w, c) or (b, h, w), as float32 (b, c, h, w)."""
        x = batch[k]
        x = x[..., None] if x.ndim == 3 else x
        return x.movedim(-1, 1).contiguous().float()

    def get_last_layer(self) -> Tensor:
        """The weight at which the two gradients that set the discriminator's weight are compared."""
        return self.decoder.conv_out.weight

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        """The reconstruction of x, and what else `get_loss` needs to know of how it came about."""
        raise NotImplementedError

    def get_loss(self, x: Tensor, outcome: tuple[Tensor, Any], part: int, split: str) -> tuple[Tensor, dict]:
        """The loss of the autoencoder (part 0) or the discriminator (part 1) on what `reconstruct` gave."""
        raise NotImplementedError

    @property
    def batches_trained(self) -> int:
        """Updates so far: Lightning counts a step for each optimizer."""
        return self.global_step // self.turns

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One update of the autoencoder, then one of the discriminator on the same reconstructions."""
        x = self.get_input(batch, self.image_key)
        outcome = self.reconstruct(x)
        due = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        optimizers = self.optimizers() if self.turns > 1 else [self.optimizers()]
        for part, (optimizer, name) in enumerate(zip(optimizers, ("aeloss", "discloss"))):
            with optimizer.toggle_model(sync_grad=due):
                loss, parts = self.get_loss(x, outcome, part, "train")
                self.manual_backward(loss / self.accumulate_grad_batches)
                if due:
                    optimizer.step()
                    optimizer.zero_grad()
            self.log(name, loss.detach(), prog_bar=True, on_step=True, on_epoch=True)
            self.log_dict(parts, on_step=True, on_epoch=False)
        if due:
            for scheduler in self.lr_schedulers() or ():
                scheduler.step()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Let the averaged weights follow."""
        if self.use_ema:
            self.model_ema(self)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log both losses on a batch, with the averaged weights too where there are some."""
        self._validate(batch, "val")
        if self.use_ema:
            with self.ema_scope():
                self._validate(batch, "val_ema")

    def _validate(self, batch: Mapping[str, Any], split: str) -> None:
        x = self.get_input(batch, self.image_key)
        outcome = self.reconstruct(x)
        for part in range(self.turns):
            _, parts = self.get_loss(x, outcome, part, split)
            self.log_dict(parts, batch_size=len(x))

    def _optimizers(self, autoencoder: list[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
        """Adam for the autoencoder at `lr`, and Adam for the discriminator, if there is one, at `learning_rate`."""
        groups = [(autoencoder, lr)]
        if self.turns > 1:
            groups.append((self.loss.discriminator.parameters(), self.learning_rate))
        return [torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9)) for parameters, rate in groups]

    def _autoencoder_parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
                for p in module.parameters()]

    # ------------------------------------------------------------------------------------------------------- images

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show maps of many channels as colours in [-1, 1], each channel in a colour drawn once."""
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        x = F.conv2d(x, weight=self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, log_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures to look at, (b, 3, h, w) by name: inputs, reconstructions and what the class adds to them."""
        x = self.get_input(batch, self.image_key).to(self.device)
        images = {"inputs": x}
        if not only_inputs:
            images |= self._show(x)
            if log_ema:
                with self.ema_scope():
                    images |= {f"{name}_ema": image for name, image in self._show(x).items()}
        return {name: self.to_rgb(image) if image.shape[1] > 3 else image for name, image in images.items()}

    def _show(self, x: Tensor) -> dict[str, Tensor]:
        return {"reconstructions": self.reconstruct(x)[0]}


class AutoencoderKL(Autoencoder):
    """The autoencoder whose latent is Gaussian, held near the standard normal (Rombach et al. 2022, appendix G).

    ema_decay keeps an average of the weights; learn_logvar trains the loss's variance too. scale_factor is only kept:
    LatentDiffusion scales the latents.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
        scale_factor: float = 1.0,
    ):
        if not ddconfig.get("double_z", True):
            raise ValueError("AutoencoderKL needs double_z: true in its ddconfig, for a mean and a variance")
        super().__init__(ddconfig, lossconfig, embed_dim, 2, image_key, colorize_nlabels, monitor)
        self.learn_logvar = learn_logvar
        self.scale_factor = scale_factor
        if ema_decay is not None:
            self.init_ema(decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """The posterior of the latent (b, embed_dim, h / f, w / f) of pictures x."""
        return DiagonalGaussianDistribution(self._features(x))

    def decode(self, z: Tensor) -> Tensor:
        """The pictures of latents z, in float32."""
        return self._picture(z)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """The reconstruction and the posterior, which is sampled or else taken at its mode."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        return self(x)

    def get_loss(self, x, outcome, part, split):
        reconstruction, posterior = outcome
        step, last_layer = self.batches_trained, self.get_last_layer()
        return self.loss(x, reconstruction, posterior, part, step, last_layer=last_layer, split=split)

    def configure_optimizers(self) -> tuple[list, list]:
        """Adam for the autoencoder and Adam for the discriminator."""
        variance = [self.loss.logvar] if self.learn_logvar else []
        return self._optimizers(self._autoencoder_parameters() + variance, self.learning_rate), []

    def _show(self, x: Tensor) -> dict[str, Tensor]:
        reconstruction, posterior = self(x)
        return {"samples": self.decode(torch.randn_like(posterior.mean)), "reconstructions": reconstruction}


class VQModel(Autoencoder):
    """The autoencoder whose latent pixels are codes of a codebook (Esser et al. 2021).

    batch_resize_range: (least, most) side to which each batch in training is resized, in steps of 16. lr_g_factor: the
    autoencoder's learning rate over the discriminator's. remap, sane_index_shape: see `VectorQuantizer`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ):
        super().__init__(ddconfig, lossconfig, embed_dim, 1, image_key, colorize_nlabels, monitor)
        self.n_embed = n_embed
        self.quantize = VectorQuantizer(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.batch_resize_range = batch_resize_range
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        if use_ema:
            self.init_ema()
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """The quantised latent (b, embed_dim, h / f, w / f), the codebook's loss and (None, None, ids)."""
        return self.quantize(self._features(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """The latent before it is quantised."""
        return self._features(x)

    def decode(self, quant: Tensor) -> Tensor:
        """The pictures of quantised latents, in float32."""
        return self._picture(quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """The pictures of ids (b, h / f, w / f)."""
        return self.decode(self.quantize.get_codebook_entry(code_b).movedim(-1, 1))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple:
        """The reconstruction and the codebook's loss, then the ids if asked for."""
        quant, loss, (_, _, ids) = self.encode(input)
        picture = self.decode(quant)
        return (picture, loss, ids) if return_pred_indices else (picture, loss)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        x = super().get_input(batch, k)
        if self.batch_resize_range is None:
            return x
        least, most = self.batch_resize_range
        # The largest size comes first, so that memory that does not suffice shows at once.
        side = most if self.batches_trained <= 4 else int(np.random.choice(np.arange(least, most + 16, 16)))
        return x if side == x.shape[2] else F.interpolate(x, size=side, mode="bicubic").detach()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        reconstruction, loss, ids = self(x, return_pred_indices=True)
        return reconstruction, (loss, ids)

    def get_loss(self, x, outcome, part, split):
        reconstruction, (loss, ids) = outcome
        step, last_layer = self.batches_trained, self.get_last_layer()
        return self.loss(
            loss, x, reconstruction, part, step, last_layer=last_layer, split=split, predicted_indices=ids
        )

    def configure_optimizers(self) -> tuple[list, list]:
        """Adam for the autoencoder and Adam for the discriminator, each with the schedule of the config, if any."""
        generator = self._autoencoder_parameters() + list(self.quantize.parameters())
        optimizers = self._optimizers(generator, self.lr_g_factor * self.learning_rate)
        if self.scheduler_config is None:
            return optimizers, []
        schedule = instantiate_from_config(self.scheduler_config).schedule
        return optimizers, [{"scheduler": LambdaLR(o, lr_lambda=schedule), "interval": "step"} for o in optimizers]


class VQModelInterface(VQModel):
    """VQModel as a first stage: diffusion works on what is not yet quantised, and decoding begins by quantising it."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """The latent (b, embed_dim, h / f, w / f) before it is quantised."""
        return self._features(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """The pictures of latents h, in float32."""
        return self._picture(h if force_not_quantize else self.quantize(h)[0])


class IdentityFirstStage(nn.Module):
    """The first stage of diffusion on pixels: the latent is the picture."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
