"""What DDIMSampler and PLMSSampler share: the schedule buffers, the loop and the names of the original."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ldm.modules.diffusionmodules.util import noise_like
from ldm.sampling.guidance import guide
from ldm.sampling.prediction import CLEAN, Level, Prediction, to_prediction
from ldm.sampling.schedule import Schedule, make_ddim_sampling_parameters, make_ddim_timesteps
from ldm.sampling.vp import Draw

logger = logging.getLogger(__name__)


def progress(items: Sequence, description: str, verbose: bool):
    """`items` behind a bar on stderr, if `verbose` and on a terminal."""
    return tqdm(items, desc=description, disable=None if verbose else True)


def warn_of_batch_size(conditioning: Any, batch_size: int) -> None:
    """Log a warning where a conditioning is not for `batch_size` images; of a dict, its first entry is looked at."""
    if isinstance(conditioning, Mapping):
        conditioning = next(iter(conditioning.values()), None)
        while isinstance(conditioning, list):
            conditioning = conditioning[0] if conditioning else None
    for one in conditioning if isinstance(conditioning, list) else [conditioning]:
        if one is not None and one.shape[0] != batch_size:
            logger.warning("got %d conditionings but batch_size is %d", one.shape[0], batch_size)


def limit_norm(x0: Tensor, largest: float) -> Tensor:
    """Scale each latent (b, ...) whose root mean square is over `largest` down to it."""
    rms = x0.flatten(1).square().mean(1).sqrt().clamp(min=largest)
    return x0 * (largest / rms).view(-1, *[1] * (x0.ndim - 1))


class ModelSampler:
    """A sampler bound to a model, which must have apply_model, the schedule buffers and num_timesteps.

    device: where latents live, the model's own by default.
    """

    def __init__(self, model, device: torch.device | str | None = None):
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self._device = device

    @property
    def device(self) -> torch.device:
        return self.model.betas.device if self._device is None else torch.device(self._device)

    def register_buffer(self, name: str, attr) -> None:
        """Keep `attr` under `name`, a tensor on the sampler's device."""
        setattr(self, name, attr.to(self.device) if isinstance(attr, Tensor) else attr)

    def _predict(
        self,
        x: Tensor,
        c,
        t: Tensor,
        level: Level,
        uncond=None,
        scale: float = 1.0,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
    ) -> Prediction:
        """Ask the model at t (b,), with guidance, what x at `level` holds."""
        kind = getattr(self.model, "parameterization", "eps")
        out = guide(self.model.apply_model, c, uncond, scale)(x, t)
        if score_corrector is not None:
            if kind != "eps":
                raise ValueError(f"a score_corrector corrects eps, but this model predicts {kind}")
            out = score_corrector.modify_score(self.model, out, x, t, c, **(corrector_kwargs or {}))
        return to_prediction(kind, x, out, level)

    def _settle(self, pred: Prediction, quantize: bool, largest: float | None) -> Prediction:
        """Snap the clean latent to the VQ codebook, or limit its norm, where that is asked for; the noise stays."""
        x0 = self.model.first_stage_model.quantize(pred.x0)[0] if quantize else pred.x0
        return Prediction(x0 if largest is None else limit_norm(x0, largest), pred.eps)


class ClassicSampler(ModelSampler):
    """The buffers and the loop of DDIM and PLMS; a subclass says what a step is."""

    def __init__(self, model, schedule: str = "linear", device: torch.device | str | None = None, **kwargs):
        super().__init__(model, device)
        self.schedule = schedule

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps, and keep what they and the whole schedule imply under the names of the original."""
        trained = Schedule(self.model.alphas_cumprod)
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, len(trained), verbose)
        self.ddim_eta = ddim_eta
        kept = self.model.alphas_cumprod.detach().float().cpu()
        before = self.model.alphas_cumprod_prev.detach().float().cpu()
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(kept, self.ddim_timesteps, ddim_eta, verbose)
        self.register_buffer("betas", self.model.betas.detach().float())
        self.register_buffer("alphas_cumprod", kept)
        self.register_buffer("alphas_cumprod_prev", before)
        self.register_buffer("sqrt_alphas_cumprod", kept.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - kept).sqrt())
        self.register_buffer("log_one_minus_alphas_cumprod", (1 - kept).log())
        self.register_buffer("sqrt_recip_alphas_cumprod", (1 / kept).sqrt())
        self.register_buffer("sqrt_recipm1_alphas_cumprod", (1 / kept - 1).sqrt())
        self.register_buffer("ddim_sigmas", sigmas)
        self.register_buffer("ddim_alphas", alphas)
        self.register_buffer("ddim_alphas_prev", alphas_prev)
        self.register_buffer("ddim_sqrt_one_minus_alphas", (1 - alphas).sqrt())
        spread = ddim_eta * ((1 - before) / (1 - kept) * (1 - kept / before)).sqrt()
        self.register_buffer("ddim_sigmas_for_original_num_steps", spread)
        # Ascending, each with the level below it in front: a step of index i leads from i + 1 to i.
        self._ddim_levels = [trained.level(int(t)) for t in (0, *self.ddim_timesteps)]
        self._trained_levels = [CLEAN, *map(trained.level, range(len(trained)))]

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning=None,
        callback: Callable[[int], None] | None = None,
        normals_sequence=None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning=None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        **kwargs,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Latents (b, c, h, w) in S steps from x_T or noise, and those on the way: {x_inter, pred_x0}, x_T first.

        shape: (c, h, w). mask: 1 where x0 (b, c, h, w) is kept. ucg_schedule: a guidance scale for each step.
        """
        warn_of_batch_size(conditioning, batch_size)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        x = torch.randn((batch_size, *shape), device=self.device) if x_T is None else x_T
        return self._loop(
            x,
            conditioning,
            self.ddim_timesteps,
            verbose,
            callback=callback,
            img_callback=img_callback,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            ucg_schedule=ucg_schedule,
            quantize_denoised=quantize_x0,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
        )

    def _loop(
        self,
        x: Tensor,
        cond,
        timesteps: np.ndarray,
        verbose: bool = True,
        *,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        log_every_t: int = 100,
        ucg_schedule: Sequence[float] | None = None,
        **options,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Step x (b, c, h, w) down ascending timesteps; options go to every step. Returns what `sample` does."""
        if mask is not None and x0 is None:
            raise ValueError("a mask needs x0, the latents (b, c, h, w) that it keeps")
        if ucg_schedule is not None and len(ucg_schedule) != len(timesteps):
            raise ValueError(f"ucg_schedule needs {len(timesteps)} scales, one for each step, got {len(ucg_schedule)}")
        step = self._stepper(timesteps)
        seen = {"x_inter": [x], "pred_x0": [x]}
        last = len(timesteps) - 1
        for i, t in enumerate(progress(timesteps[::-1], type(self).__name__, verbose)):
            index, ts = last - i, torch.full((len(x),), int(t), device=x.device)
            if mask is not None:
                x = self.model.q_sample(x0, ts) * mask + (1.0 - mask) * x
            if ucg_schedule is not None:
                options["unconditional_guidance_scale"] = ucg_schedule[i]
            x, pred_x0 = step(x, cond, ts, index=index, **options)
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == last:
                seen["x_inter"].append(x)
                seen["pred_x0"].append(pred_x0)
        return x, seen

    def _stepper(self, timesteps: np.ndarray) -> Callable[..., tuple[Tensor, Tensor]]:
        """(x, cond, t (b,), index=, **options) -> (the next x, the estimate of x0), for one walk down `timesteps`."""
        raise NotImplementedError

    def _levels(self, index: int, use_original_steps: bool) -> tuple[Level, Level]:
        """The level of step `index`, and the one that it leads to."""
        then, now = (self._trained_levels if use_original_steps else self._ddim_levels)[index:index + 2]
        return now, then

    def _draw(self, repeat: bool, temperature: float, dropout: float) -> Draw:
        def draw(like: Tensor) -> Tensor:
            noise = temperature * noise_like(like.shape, like.device, repeat)
            return functional.dropout(noise, dropout) if dropout > 0 else noise

        return draw
