"""A noise level, and what a network says at it."""

import math
from typing import NamedTuple

from torch import Tensor

from ldm.errors import RequestError


class Level(NamedTuple):
    """A noise level: x = alpha * x0 + sigma * eps with alpha**2 + sigma**2 = 1.

    t is what the network is told: an int at a trained step, a float between two.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma): -inf where only noise is left, inf where none is."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)

    @property
    def edm_sigma(self) -> float:
        """The noise level of x / alpha = x0 + edm_sigma * eps, the variable of Karras et al. 2022."""
        return self.sigma / self.alpha if self.alpha else math.inf


CLEAN = Level(t=0, alpha=1.0, sigma=0.0)


class Prediction(NamedTuple):
    """The clean latent and the noise (b, c, h, w) that a network sees in x."""

    x0: Tensor
    eps: Tensor


def to_prediction(kind: str, x: Tensor, out: Tensor, level: Level) -> Prediction:
    """Read a network output as the clean latent and the noise it implies.

    x, out: (b, c, h, w), where x = alpha * x0 + sigma * eps; v = alpha * eps - sigma * x0 (Salimans & Ho 2022, app. D).
    Raises RequestError for eps where alpha is 0: noise alone says nothing of the picture.
    """
    _, a, s = level
    match kind:
        case "eps":
            if not a:
                raise RequestError("a model that predicts eps cannot start where alpha is 0; choose another schedule")
            return Prediction((x - s * out) / a, out)
        case "x0":
            return Prediction(out, (x - a * out) / s)
        case "v":
            return Prediction(a * x - s * out, s * x + a * out)
    raise ValueError(f"parameterization must be eps, x0 or v, got {kind!r}")


def eps_slope(kind: str, level: Level) -> float:
    """How much the eps of `to_prediction` changes with the output: what a difference of outputs is worth in noise."""
    match kind:
        case "v":
            return level.alpha
        case "x0":
            return -level.alpha / level.sigma
    return 1.0
