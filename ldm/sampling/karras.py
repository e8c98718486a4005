"""Samplers in the view of Karras et al. 2022: X = x / alpha = x0 + sigma * eps, along which dX / dsigma = eps.

Here `sigma` is the level's edm_sigma = sigma / alpha. The state stays the latent x, and x / alpha is a view of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import RequestError
from ldm.sampling.dpm import multistep
from ldm.sampling.prediction import Level
from ldm.sampling.vp import Denoise, Draw

At = Callable[[float], Level]


def view(x: Tensor, level: Level) -> Tensor:
    """X = x / alpha (b, c, h, w). Raises RequestError where alpha is 0, since sigma is infinite there."""
    if not level.alpha:
        raise RequestError("this sampler needs a finite sigma, but the schedule starts from pure noise "
                           "(zero terminal SNR); use ddim, dpm_solver, euler or dpmpp_2m")
    return x / level.alpha


def ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(down, up): a step to `down` and noise of size `up` lead to sigma_next (Song et al. 2021, eq. 16 at eta 1)."""
    up = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    return (sigma_next**2 - up**2) ** 0.5, up


def sample_euler(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each Euler step in sigma, which is DDIM's."""
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        x = then.alpha * (x0 + then.edm_sigma * eps)
        yield x


def sample_euler_a(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each Euler step down and the noise that leads back up to the next level."""
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        down, up = ancestral(now.edm_sigma, then.edm_sigma)
        x = then.alpha * _renoise(x0 + down * eps, up, draw)
        yield x


def sample_heun(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each Heun step: two evaluations (Karras et al. 2022, algorithm 1)."""
    for now, then in pairwise(levels):
        start, slope = view(x, now), denoise(x, now).eps
        step = then.edm_sigma - now.edm_sigma
        if then.sigma:
            slope = (slope + denoise(then.alpha * (start + step * slope), then).eps) / 2
        x = then.alpha * (start + step * slope)
        yield x


def sample_dpm2(denoise: Denoise, x: Tensor, levels: Sequence[Level], *, at: At) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each step by the slope half way in log sigma (after arXiv 2206.00927).

    at: sigma -> level, which is `Schedule.at`, here and below: these samplers evaluate between the levels.
    """
    for now, then in pairwise(levels):
        x = then.alpha * _midpoint(denoise, x, now, then.edm_sigma, at)
        yield x


def sample_dpm2_a(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, at: At, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each `sample_dpm2` step down and the noise that leads back up."""
    for now, then in pairwise(levels):
        down, up = ancestral(now.edm_sigma, then.edm_sigma)
        x = then.alpha * _renoise(_midpoint(denoise, x, now, down, at), up, draw)
        yield x


def sample_lms(denoise: Denoise, x: Tensor, levels: Sequence[Level], *, order: int = 4) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each Adams-Bashforth move over up to four uneven steps of sigma."""
    sigmas, slopes = [], []
    for now, then in pairwise(levels):
        sigmas, slopes = [now.edm_sigma, *sigmas[:order - 1]], [denoise(x, now).eps, *slopes[:order - 1]]
        weights = multistep_weights(sigmas, then.edm_sigma)
        x = then.alpha * (view(x, now) + sum(weight * slope for weight, slope in zip(weights, slopes)))
        yield x


def multistep_weights(sigmas: Sequence[float], end: float) -> list[float]:
    """Integrals from sigmas[0] to `end` of the Lagrange polynomials through at most four sigmas, newest first."""
    middle, half = (sigmas[0] + end) / 2, (end - sigmas[0]) / 2

    def lagrange(sigma: float, j: int) -> float:
        return math.prod((sigma - other) / (sigmas[j] - other) for k, other in enumerate(sigmas) if k != j)

    # Two Gauss-Legendre points integrate a cubic exactly.
    points = (middle - half / 3**0.5, middle + half / 3**0.5)
    return [half * sum(lagrange(point, j) for point in points) for j in range(len(sigmas))]


def sample_dpmpp_2s_a(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, at: At, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each DPM-Solver++(2S) step down and the noise that leads back up.

    Algorithm 1 of arXiv 2211.01095 with the evaluation half way in log sigma.
    """
    for now, then in pairwise(levels):
        start, x0 = view(x, now), denoise(x, now).x0
        down, up = ancestral(now.edm_sigma, then.edm_sigma)
        if down:
            middle = at((now.edm_sigma * down) ** 0.5)
            x0 = denoise(middle.alpha * _towards(start, x0, middle.edm_sigma / now.edm_sigma), middle).x0
        x = then.alpha * _renoise(_towards(start, x0, down / now.edm_sigma), up, draw)
        yield x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each DPM-Solver++(2M) move (arXiv 2211.01095, algorithm 2)."""
    return multistep(denoise, x, levels, order=2)


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each SDE-DPM-Solver++(2M) move (arXiv 2211.01095, sec. 5)."""
    h_last, last = None, None
    for now, then in pairwise(levels):
        start, x0 = view(x, now), denoise(x, now).x0
        ratio, h = then.edm_sigma / now.edm_sigma, then.log_snr - now.log_snr
        toward = x0 if last is None or not then.sigma else x0 + h / h_last / 2 * (x0 - last)
        x = then.alpha * _renoise(_towards(start, toward, ratio**2), then.edm_sigma * (1 - ratio**2) ** 0.5, draw)
        h_last, last = h, x0
        yield x


def sample_dpmpp_sde(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, at: At, draw: Draw = torch.randn_like
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each step of DPM-Solver++(SDE): two evaluations, half way in log sigma.

    The noise of the half step and of the whole are increments of one Brownian motion in sigma: that of the first half
    is drawn first, that of the second half second, and the whole is their sum.
    """
    for now, then in pairwise(levels):
        start, x0 = view(x, now), denoise(x, now).x0
        whole = 0.0
        if then.sigma:
            middle = at((now.edm_sigma * then.edm_sigma) ** 0.5)
            share = (now.edm_sigma - middle.edm_sigma) / (now.edm_sigma - then.edm_sigma)
            first, second = draw(x), draw(x)
            whole = share**0.5 * first + (1 - share) ** 0.5 * second
            down, up = ancestral(now.edm_sigma, middle.edm_sigma)
            halfway = _towards(start, x0, down / now.edm_sigma) + up * first
            x0 = denoise(middle.alpha * halfway, middle).x0
        down, up = ancestral(now.edm_sigma, then.edm_sigma)
        x = then.alpha * (_towards(start, x0, down / now.edm_sigma) + up * whole)
        yield x


def _towards(start: Tensor, x0: Tensor, ratio: float) -> Tensor:
    """X where sigma has shrunk to `ratio` of what it was, had x0 stayed constant."""
    return ratio * start + (1 - ratio) * x0


def _renoise(start: Tensor, up: float, draw: Draw) -> Tensor:
    return start + up * draw(start) if up else start


def _midpoint(denoise: Denoise, x: Tensor, now: Level, end: float, at: At) -> Tensor:
    """X at sigma = end by the slope at the geometric mean of both sigmas; by the slope at hand where end is 0."""
    start, slope = view(x, now), denoise(x, now).eps
    if end:
        middle = at((now.edm_sigma * end) ** 0.5)
        slope = denoise(middle.alpha * (start + (middle.edm_sigma - now.edm_sigma) * slope), middle).eps
    return start + (end - now.edm_sigma) * slope
