"""The models around a latent denoiser: the autoencoder before and after it, and the encoder of its conditions."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.util import NO_STAGE, instantiate_from_config

# Batch keys whose entries reach the cond stage as they are: texts by themselves, classes with the whole batch.
TEXT_KEYS = ("caption", "txt")
CLASS_KEYS = ("class_label", "cls")


def disabled_train(self, mode: bool = True):
    """Stands in for the `train` of a frozen stage, so that it stays in eval mode."""
    return self


def frozen(stage: nn.Module) -> nn.Module:
    """Keep a stage in eval mode and its parameters out of training."""
    stage.eval()
    stage.train = partial(disabled_train, stage)
    return stage.requires_grad_(False)


class Stages:
    """First stage (autoencoder) and cond stage (encoder of texts, classes ...), mixed into a diffusion model."""

    def instantiate_first_stage(self, config: Mapping) -> None:
        """Build the autoencoder, frozen."""
        self.first_stage_model = frozen(instantiate_from_config(config))

    def instantiate_cond_stage(self, config: Mapping | str) -> None:
        """Build the encoder of conditions, frozen unless `cond_stage_trainable`.

        "__is_first_stage__": the autoencoder serves as encoder too; "__is_unconditional__": there is none.
        """
        if config in NO_STAGE:
            if self.cond_stage_trainable:
                raise ConfigError(f"cond_stage_trainable needs a cond_stage_config to train, got {config}")
            self.cond_stage_model = self.first_stage_model if config == "__is_first_stage__" else None
            return
        stage = instantiate_from_config(config)
        self.cond_stage_model = stage if self.cond_stage_trainable else frozen(stage)

    def make_cond_schedule(self, num_timesteps_cond: int) -> None:
        """Where there are several levels of conditioning noise, `cond_ids` (timesteps,) says which each t goes with."""
        if num_timesteps_cond > self.num_timesteps:
            raise ConfigError(f"num_timesteps_cond must be at most {self.num_timesteps}, got {num_timesteps_cond}")
        self.num_timesteps_cond = num_timesteps_cond
        self.shorten_cond_schedule = num_timesteps_cond > 1
        with torch.device("cpu"):
            ids = torch.full((self.num_timesteps,), self.num_timesteps - 1)
            ids[:num_timesteps_cond] = torch.linspace(0, self.num_timesteps - 1, num_timesteps_cond).round().long()
        self.register_buffer("cond_ids", ids, persistent=False)

    def noised_condition(self, cond, t: Tensor):
        """The condition with the noise that it has at t; as it is, unless num_timesteps_cond is over 1."""
        return self.q_sample(cond, self.cond_ids[t]) if self.shorten_cond_schedule else cond

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor):
        """Pictures (b, 3, h, w) in [-1, 1] -> the posterior (KL) or the latents (VQ), before scaling."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior) -> Tensor:
        """The latents that diffusion works on: a sample of the posterior, or the tensor itself, times scale_factor."""
        tensor = isinstance(encoder_posterior, Tensor)
        latents = self.scale_factor * (encoder_posterior if tensor else encoder_posterior.sample())
        return latents.contiguous()  # noise drawn like them must not depend on how the weights are laid out

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` through which gradients flow."""
        stage = self.first_stage_model
        if predict_cids:
            ids = z.argmax(dim=1) if z.ndim == 4 else z
            z = stage.quantize.get_codebook_entry(ids, shape=None).movedim(-1, 1).contiguous()
        z = 1.0 / self.scale_factor * z
        if hasattr(stage, "quantize"):
            return stage.decode(z, force_not_quantize=predict_cids or force_not_quantize)
        return stage.decode(z)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Latents (b, c, h, w) -> pictures (b, 3, H, W), about [-1, 1]; divides by scale_factor first.

        A VQ stage snaps the latents to its codebook, unless force_not_quantize. predict_cids: z holds codebook ids
        (b, h, w), or a score for each id (b, ids, h, w).
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def get_learned_conditioning(self, c):
        """Encode texts, a batch of classes or an image as the network takes them, by the cond stage's `encode`, by the
        method that `cond_stage_forward` names, or by calling it; of a Gaussian the mode.
        """
        stage = self.cond_stage_model
        encode = getattr(stage, self.cond_stage_forward or "encode", None)
        if encode is None and self.cond_stage_forward is None:
            encode = stage
        c = encode(c)
        return c.mode() if hasattr(c, "mode") and not isinstance(c, Tensor) else c

    @torch.no_grad()
    def get_unconditional_conditioning(self, batch_size: int, null_label=None):
        """The condition that stands for none, `batch_size` times: what `null_label` ("" for text) encodes to, or the
        class that a class encoder keeps for it.
        """
        if null_label is None:
            if self.cond_stage_key not in CLASS_KEYS:
                raise ValueError(f'conditions of kind {self.cond_stage_key!r} need a null_label, such as "" for text')
            empty = self.cond_stage_model.get_unconditional_conditioning(batch_size, device=self.device)
            return self.get_learned_conditioning(empty)
        if isinstance(null_label, str):
            null_label = [null_label]
        elif isinstance(null_label, Tensor):
            null_label = null_label.to(self.device)
        elif not isinstance(null_label, dict):
            null_label = list(null_label)  # OmegaConf's lists too
        return repeated(self.get_learned_conditioning(null_label), batch_size)


def repeated(cond, batch_size: int):
    """One condition (1, ...), or a list of them, as a batch (b, ...); a batch stays as it is."""
    if isinstance(cond, list):
        return [repeated(c, batch_size) for c in cond]
    return cond if len(cond) == batch_size else cond.repeat(batch_size, *(1,) * (cond.ndim - 1))
