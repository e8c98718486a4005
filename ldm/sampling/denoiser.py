"""A network, its parameterization and its guidance as one function: (x, level) -> Prediction."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.sampling.guidance import ApplyModel, Ask, Guidance, Told, ask
from ldm.sampling.prediction import Level, Prediction, eps_slope, to_prediction


@dataclass
class Denoiser:
    """What samplers call: x (b, c, h, w) at a level -> the clean latent and the noise in it.

    ask: (x, t (b,), alone) -> what the network says to all that it is told, or to the prompt alone, which the loop
    around a walk may replace from step to step; kind: what that is, eps, v or x0; guidance: makes one output of it.
    interval: the noise levels (low, high], of sigma / alpha, that are guided (Kynkäänniemi et al. 2024, eq. 6); at the
    others the prompt is asked alone.
    """

    ask: Ask
    kind: str
    guidance: Guidance
    interval: tuple[float, float] = (-math.inf, math.inf)

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        low, high = self.interval
        alone = not low < level.edm_sigma <= high
        out = self.guidance(self.ask(x, timestep(level.t, x), alone), eps_slope(self.kind, level))
        return to_prediction(self.kind, x, out, level)


def timestep(t: float, x: Tensor) -> Tensor:
    """t for each latent of a batch (b, ...): int64 at a trained step, else float32."""
    dtype = torch.long if isinstance(t, int) else torch.float32
    return torch.full((x.shape[0],), t, device=x.device, dtype=dtype)


def denoiser(apply_model: ApplyModel, kind: str, cond: Any, uncond: Any = None, scale: float = 1.0) -> Denoiser:
    """Denoise with `model.apply_model`, `model.parameterization` and classifier-free guidance (see `guide`)."""
    told = Told(cond=cond, uncond=None if scale == 1 else uncond)
    return Denoiser(ask(apply_model, told), kind, Guidance(scale))
