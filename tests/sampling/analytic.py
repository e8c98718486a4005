"""A denoiser whose answers are known: each value of a latent is drawn from two Gaussians at +-CENTRE."""

import math

import numpy as np
import torch
from torch import Tensor

from ldm.sampling import Level, Prediction, Schedule, make_beta_schedule

CENTRE, SPREAD = 0.8, 0.4

SCHEDULE = Schedule(np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012)))


def denoise(x: Tensor, level: Level) -> Prediction:
    """The mean of x0 given x = alpha * x0 + sigma * eps, and the noise that it leaves."""
    _, alpha, sigma = level
    variance = alpha**2 * SPREAD**2 + sigma**2
    side = torch.tanh(alpha * CENTRE * x / variance)
    x0 = (alpha * SPREAD**2 * x + sigma**2 * CENTRE * side) / variance
    return Prediction(x0, (x - alpha * x0) / sigma)


def solve(x: Tensor, start: Level, end: Level) -> Tensor:
    """Where the probability-flow ODE carries x from `start` to `end`: it keeps each value's quantile."""

    def quantile(value: Tensor, level: Level) -> Tensor:
        width = math.hypot(level.alpha * SPREAD, level.sigma) * 2**0.5
        return sum(torch.erf((value - sign * level.alpha * CENTRE) / width) for sign in (-1, 1)) / 2

    wanted = quantile(x, start)
    low, high = torch.full_like(x, -30.0), torch.full_like(x, 30.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = quantile(middle, end) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def geometric(steps: int, noisiest: float = 8.0, quietest: float = 0.2) -> list[Level]:
    """Levels evenly spaced in log(sigma / alpha)."""
    return [SCHEDULE.at(float(sigma)) for sigma in np.geomspace(noisiest, quietest, steps + 1)]


def last(walk) -> Tensor:
    """Where a sampler ends."""
    *_, x = walk
    return x
