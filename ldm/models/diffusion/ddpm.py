"""Diffusion models: DDPM on pixels (Ho et al. 2020), LatentDiffusion on an autoencoder's latents (Rombach et al. 2022).

The variants that YAML also finds at this dotted path are written in `variants`.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.models.base import Module
from ldm.models.diffusion.ancestral import AncestralSampling, countdown
from ldm.models.diffusion.images import ImageLog, LatentImageLog
from ldm.models.diffusion.process import PARAMETERIZATIONS, GaussianProcess
from ldm.models.diffusion.stages import CLASS_KEYS, TEXT_KEYS, Stages, disabled_train, frozen
from ldm.models.diffusion.training import Losses, Training
from ldm.modules.diffusionmodules.util import noise_like
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

VARIANTS = (
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentEditDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscale2xDiffusion",
    "LatentUpscaleDepthDiffusion",
    "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion",
    "Layout2ImgDiffusion",
)
__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "disabled_train", "uniform_on_device", *VARIANTS]

# What each conditioning key feeds to the network beside x and t.
CONDITIONING = {
    None: (),
    "concat": ("concat",),
    "crossattn": ("context",),
    "hybrid": ("concat", "context"),
    "adm": ("label",),
    "hybrid-adm": ("concat", "context", "y"),
    "crossattn-adm": ("context", "y"),
}
RESTART_KEYS = ("ckpt_path", "ignore_keys", "load_only_unet", "make_it_fit", "reset_ema", "reset_num_ema_updates")


def __getattr__(name: str):
    """The variants, imported at the first use because they subclass what is defined here."""
    if name in VARIANTS:
        return getattr(importlib.import_module("ldm.models.diffusion.variants"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def uniform_on_device(r1: float, r2: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Uniform numbers from r2 to r1."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


class DiffusionWrapper(Module):
    """The denoising network, and how each kind of conditioning reaches it.

    `scripted_diffusion_model`, if it is set, is called instead of `diffusion_model`, all arguments by position.
    """

    def __init__(self, diff_model_config: Mapping, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING:
            raise ConfigError(f"conditioning_key must be one of {list(CONDITIONING)}, got {conditioning_key!r}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: list[Tensor] | None = None,
        c_crossattn: list[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """The network's output for x (b, c, h, w) at t (b,).

        c_concat: (b, *, h, w) each, joined to x by channel; c_crossattn: (b, n, d) each, joined by token to the context
        of cross-attention, but under the key adm its first entry is the label; c_adm: labels (b,) or vectors (b, d).
        """
        fed = CONDITIONING[self.conditioning_key]
        if "concat" in fed:
            x = torch.cat([x, *c_concat], dim=1)
        given = {}
        if "context" in fed:
            given["context"] = torch.cat(c_crossattn, dim=1)
        if "y" in fed:
            given["y"] = c_adm
        if "label" in fed:
            given["y"] = c_crossattn[0]
        if hasattr(self, "scripted_diffusion_model"):
            return self.scripted_diffusion_model(x, t, *given.values())
        return self.diffusion_model(x, t, **given)


class DDPM(GaussianProcess, Training, ImageLog, Module):
    """An unconditional diffusion model of images (b, c, h, w) in [-1, 1].

    The keywords are those of published YAML: what to load is for `restart`, all that is not named here for
    `init_training`. zero_terminal_snr is new: off, or the betas of Lin et al. 2024.
    """

    def __init__(
        self,
        unet_config: Mapping,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        v_posterior: float = 0.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        use_positional_encodings: bool = False,
        zero_terminal_snr: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise ConfigError(f"parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}")
        if use_positional_encodings:
            raise ConfigError("use_positional_encodings was never released by CompVis; remove it from the config")
        restart = {key: kwargs.pop(key) for key in RESTART_KEYS if key in kwargs}
        self.parameterization = parameterization
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.v_posterior = v_posterior
        self.zero_terminal_snr = zero_terminal_snr
        self.cond_stage_model = None
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.init_training(**kwargs)
        self.restart(**restart)

    def get_input(self, batch: Mapping, k: str) -> Tensor:
        """Images (b, h, w, c) or (b, h, w) of a batch as float32 (b, c, h, w)."""
        x = batch[k]
        x = x[..., None] if x.ndim == 3 else x
        return x.movedim(-1, 1).float().contiguous()

    def shared_step(self, batch: Mapping, **kwargs) -> Losses:
        """The loss of a batch at random timesteps, and its parts by name."""
        return self(self.get_input(batch, self.first_stage_key), **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Losses:
        return self.p_losses(x, self.draw_timesteps(x), *args, **kwargs)

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Losses:
        """The loss at the timesteps t (b,), and its parts by name."""
        return self.diffusion_loss(x_start, None, t, noise)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: None = None) -> Tensor:
        """The network's output for x_noisy (b, c, h, w) at t (b,)."""
        return self.model(x_noisy, t)

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t)."""
        x_start = self.predict_start(x, t, self.apply_model(x, t))
        return self.q_posterior(x_start.clamp(-1.0, 1.0) if clip_denoised else x_start, x, t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """A draw of x_{t-1} given x_t (Ho et al. 2020, algorithm 2)."""
        mean, _, log_variance = self.p_mean_variance(x, t, clip_denoised)
        return self.step_noise(mean, log_variance, t, noise_like(x.shape, x.device, repeat_noise))

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False):
        """Images (b, c, h, w) from noise; with return_intermediates also a list of x every log_every_t steps."""
        x = torch.randn(tuple(shape), device=self.device)
        seen = [x]
        for i, t in countdown(x, self.num_timesteps):
            x = self.p_sample(x, t, clip_denoised=self.clip_denoised)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                seen.append(x)
        return (x, seen) if return_intermediates else x

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False):
        """`batch_size` images of the model's own size."""
        shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(shape, return_intermediates)


class LatentDiffusion(Stages, AncestralSampling, LatentImageLog, DDPM):
    """A diffusion model of the latents z (b, c, h, w) of an autoencoder, conditioned through a second encoder.

    conditioning_key None is "concat" or, without concat_mode, "crossattn"; an unconditional cond_stage_config makes it
    None for good. scale_factor brings latents to unit variance; scale_by_std measures it on the first training batch.
    force_null_conditioning: the batch holds no condition although the network takes one. extra_stages: further frozen
    models to build, by attribute name.
    """

    def __init__(
        self,
        first_stage_config: Mapping,
        cond_stage_config: Mapping | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        force_null_conditioning: bool = False,
        *args,
        extra_stages: Mapping[str, Mapping | None] | None = None,
        **kwargs,
    ):
        restart = {key: kwargs.pop(key) for key in RESTART_KEYS if key in kwargs}
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.clip_denoised = False
        self.force_null_conditioning = force_null_conditioning
        self.concat_mode = concat_mode
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.scale_by_std = scale_by_std
        if scale_by_std:
            with torch.device("cpu"):
                self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        self.make_cond_schedule(num_timesteps_cond or 1)
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.extra_stages = tuple(extra_stages or ())
        for name, config in (extra_stages or {}).items():
            setattr(self, name, None if config is None else frozen(instantiate_from_config(config)))
        self.restart(**restart)

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping,
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list:
        """The first `bs` entries of a batch as [z, c], then what the flags add: x, its reconstruction, the raw cond.

        batch[k]: (b, h, w, c) in [-1, 1]. c is encoded already, unless the cond stage is trained: then `forward` does
        it, with gradients, and here only force_c_encode.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        raw = c = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            raw = self.raw_condition(batch, cond_key or self.cond_stage_key, x)
            c = raw
            if force_c_encode or not self.cond_stage_trainable:
                c = self.get_learned_conditioning(raw)
            c = c if bs is None or isinstance(c, Mapping) else c[:bs]
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(raw)
        return out

    def raw_condition(self, batch: Mapping, key: str, x: Tensor):
        """What is conditioned on, not yet encoded: texts, the batch itself for classes, else an image (b, c, h, w)."""
        if key in CLASS_KEYS:
            return batch
        if key == self.first_stage_key:
            return x
        as_it_is = (*TEXT_KEYS, "coordinates_bbox")
        raw = batch[key] if key in as_it_is else super().get_input(batch, key)
        return raw.to(self.device) if isinstance(raw, Tensor) else raw

    def shared_step(self, batch: Mapping, **kwargs) -> Losses:
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c, **kwargs)

    def forward(self, x: Tensor, c, *args, **kwargs) -> Losses:
        """The loss of latents x (b, c, h, w) under the condition c at random timesteps, and its parts by name."""
        t = self.draw_timesteps(x)
        if self.model.conditioning_key is not None:
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            c = self.noised_condition(c, t)
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(self, x_start: Tensor, cond, t: Tensor, noise: Tensor | None = None) -> Losses:
        """The loss at the timesteps t (b,), and its parts by name."""
        return self.diffusion_loss(x_start, cond, t, noise)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond, return_ids: bool = False):
        """The network's output for x_noisy (b, c, h, w) at t (b,), whole or not: the one door to it for every sampler.

        cond: a dict of DiffusionWrapper's arguments; or what the conditioning key names, as a tensor or a list.
        """
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: cond if isinstance(cond, list) else [cond]}
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes: the network, and the cond stage if it is trained too."""
        encoder = self.cond_stage_model.parameters() if self.cond_stage_trainable else ()
        return [*super().trained_parameters(), *encoder]

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping, batch_idx: int) -> None:
        """With scale_by_std, set scale_factor to 1 / std of the very first batch's latents."""
        begins = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if not self.scale_by_std or not begins or self.restarted_from_ckpt:
            return
        if self.scale_factor != 1.0:
            raise ConfigError(f"scale_by_std measures scale_factor; leave it at 1, got {self.scale_factor}")
        x = super().get_input(batch, self.first_stage_key).to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        self.scale_factor.copy_(1.0 / z.flatten().std())
        logger.info("scale_factor is now %g, 1 / std of the first latents", self.scale_factor)
