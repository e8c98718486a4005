"""Samplers in the variance-preserving view, as CompVis runs them: DDPM, DDIM and PLMS."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm.sampling.prediction import Level, Prediction, to_prediction

Denoise = Callable[[Tensor, Level], Prediction]
Draw = Callable[[Tensor], Tensor]

# Adams-Bashforth weights, newest first, by the number of earlier values.
ADAMS_BASHFORTH = {
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def move(pred: Prediction, now: Level, then: Level, eta: float = 0.0, draw: Draw = torch.randn_like) -> Tensor:
    """The latent (b, c, h, w) at the next level, eta times the posterior's noise included (Song et al. 2021, eq. 12).

    It draws noise even where eta is 0: the original does, and its next batch starts from where the generator was left.
    """
    kick = eta * then.sigma / now.sigma * (1 - (now.alpha / then.alpha) ** 2) ** 0.5
    noise = draw(pred.x0)
    return then.alpha * pred.x0 + (then.sigma**2 - kick**2) ** 0.5 * pred.eps + kick * noise


def sample_ddim(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, eta: float = 0.0, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each move down `levels`, noisiest first (Song et al. 2021)."""
    for now, then in pairwise(levels):
        x = move(denoise(x, now), now, then, eta, draw)
        yield x


def sample_ddpm(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each draw from the posterior (Ho et al. 2020, eq. 7): DDIM at eta 1."""
    yield from sample_ddim(denoise, x, levels, eta=1.0, draw=draw)


def sample_plms(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each pseudo linear multistep move (Liu et al. 2022)."""
    past: list[Tensor] = []
    for now, then in pairwise(levels):
        x, _, eps = plms_step(denoise, x, now, then, past, partial(move, now=now, then=then, draw=draw))
        past = [*past[-2:], eps]
        yield x


def plms_step(
    denoise: Denoise,
    x: Tensor,
    now: Level,
    then: Level,
    past: Sequence[Tensor],
    advance: Callable[[Prediction], Tensor],
) -> tuple[Tensor, Prediction, Tensor]:
    """One move by the eps of up to three earlier ones, oldest first: (the next x, what led there, eps at `now`).

    advance: prediction -> the next x. The first move is an improved Euler step in place of Runge-Kutta: two evaluations
    and, as in the original, two calls of `advance`.
    """
    pred = lead = denoise(x, now)
    if past:
        weights = ADAMS_BASHFORTH[len(past)]
        eps = sum(weight * value for weight, value in zip(weights, (pred.eps, *reversed(past)), strict=True))
        lead = to_prediction("eps", x, eps, now)
    elif now.alpha and then.sigma:  # else there is nothing to average: from pure noise, or straight to the clean latent
        eps = (pred.eps + denoise(advance(pred), then).eps) / 2
        lead = to_prediction("eps", x, eps, now)
    return advance(lead), lead, pred.eps
