"""Exponential integrators in lambda = log(alpha / sigma), exact for a constant clean latent: DPM-Solver++ and UniPC.

Written for x0. The same code solves for eps (plain DPM-Solver) where alpha and sigma, x0 and eps are exchanged.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ldm.errors import RequestError
from ldm.sampling.prediction import Level
from ldm.sampling.vp import Denoise

# A value of x0 and the lambda at which the network gave it.
Known = tuple[float, Tensor]

# CompVis ends walks shorter than this with moves of lower order.
SHORT_WALK = 15


def sample_dpm_solver(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], *, order: int = 2, method: str = "multistep"
) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each evaluation of DPM-Solver++ (arXiv 2211.01095, algorithms 1 and 2).

    order: 1, 2 or 3; method: "multistep" uses earlier evaluations again, "singlestep" takes `order` of them a step.
    """
    if order not in (1, 2, 3) or method not in ("multistep", "singlestep"):
        raise RequestError(f"dpm_solver has orders 1 to 3, multistep or singlestep; got order {order}, {method}")
    if method == "singlestep":
        return _singlestep(denoise, x, levels, order)
    return multistep(denoise, x, levels, order, lower_at_end=len(levels) - 1 < SHORT_WALK)


def glide(x: Tensor, x0: Tensor, now: Level, then: Level) -> Tensor:
    """Move x (b, c, h, w) from `now` to `then` along a constant x0: exact (arXiv 2211.01095, prop. 4.1)."""
    ratio = then.sigma / now.sigma
    return ratio * x + (then.alpha - ratio * now.alpha) * x0


def multistep(
    denoise: Denoise, x: Tensor, levels: Sequence[Level], order: int, lower_at_end: bool = False
) -> Iterator[Tensor]:
    """Yield after each multistep move, of lower order at the start, at infinite lambda and, if told so, at the end."""
    past: list[Known] = []
    for left, (now, then) in zip(range(len(levels) - 1, 0, -1), pairwise(levels)):
        x0 = denoise(x, now).x0
        x = glide(x, x0, now, then)
        if used := _usable(past, now, then, min(order, left) if lower_at_end else order):
            x = x + then.alpha * _curve(now.log_snr, then.log_snr, x0, used)
        past = [(now.log_snr, x0), *past[:order - 1]]
        yield x


def _usable(past: list[Known], now: Level, then: Level, order: int) -> list[Known]:
    """The earlier values, newest first, that a move of this order takes: none across an infinite step of lambda."""
    if math.isinf(then.log_snr - now.log_snr):
        return []
    return [(lam, x0) for lam, x0 in past if math.isfinite(lam)][:order - 1]


def _curve(now: float, then: float, x0: Tensor, past: list[Known]) -> Tensor:
    """What the change of x0 adds to a glide, by one or two earlier values, newest first (as in the authors' code)."""
    h = then - now
    lam1, old1 = past[0]
    r0 = (now - lam1) / h
    slope = (x0 - old1) / r0
    if len(past) == 1:
        return -math.expm1(-h) / 2 * slope
    lam2, old2 = past[1]
    r1 = (lam1 - lam2) / h
    bend = (slope - (old1 - old2) / r1) / (r0 + r1)
    return _phi2(h) * (slope + r0 * bend) - (_phi2(h) / h - 0.5) * bend


def _phi2(h: float) -> float:
    return math.expm1(-h) / h + 1


def _singlestep(denoise: Denoise, x: Tensor, levels: Sequence[Level], order: int) -> Iterator[Tensor]:
    """Yield after each evaluation; a block of them makes one step, whose inner states are of lower order.

    A block glides on from its last inner state, less what was added there, instead of from its start: for a constant x0
    that is the same, and what the caller has written into the state stays.
    """
    start = 0
    for size in _blocks(levels, order):
        block = levels[start:start + size + 1]
        for inner, (now, then) in enumerate(pairwise(block)):
            x0 = denoise(x, now).x0
            if not inner:
                first, added = x0, 0.0
            x = glide(x - added, first, now, then)
            if inner:
                whole, part = (level.log_snr - block[0].log_snr for level in (then, now))
                weight = _phi2(whole) if size == 3 else -math.expm1(-whole) / 2
                added = then.alpha * weight * whole / part * (x0 - first)
                x = x + added
            yield x
        start += size


def _blocks(levels: Sequence[Level], order: int) -> list[int]:
    """Evaluations of each singlestep step, as CompVis shares them out; steps of infinite lambda stand alone."""
    noise, clean = (int(math.isinf(level.log_snr)) for level in (levels[0], levels[-1]))
    whole, rest = divmod(max(len(levels) - 1 - noise - clean, 0), order)
    tail = [2, 1] if order == 3 and whole and not rest else [rest] if rest else []
    body = [order] * (whole - (len(tail) == 2))
    return [1] * noise + body + tail + [1] * clean


def sample_unipc(denoise: Denoise, x: Tensor, levels: Sequence[Level], *, order: int = 2) -> Iterator[Tensor]:
    """Yield the latent (b, c, h, w) after each UniP move; the next evaluation corrects it (arXiv 2302.04867, B2(h)).

    The last moves are of lower order. A correction is added to the state, so what the caller has written there stays.
    """
    past: list[Known] = []
    used, predicted, ahead = [], 0.0, None
    for left, (now, then) in zip(range(len(levels) - 1, 0, -1), pairwise(levels)):
        x0 = denoise(x, now).x0
        if ahead and math.isfinite(ahead[0].log_snr):
            x = x + _unified(*ahead, [*used, (now.log_snr, x0)]) - predicted
        x = glide(x, x0, now, then)
        used = _usable(past, now, then, min(order, left))
        predicted = _unified(now, then, x0, used) if used else 0.0
        x = x + predicted
        ahead = (now, then, x0)
        past = [(now.log_snr, x0), *past[:order - 1]]
        yield x


def _unified(now: Level, then: Level, x0: Tensor, others: list[Known]) -> Tensor:
    """What other values of x0, from behind a glide (UniP) and from its end (UniC), add to it."""
    h = then.log_snr - now.log_snr
    ratios = [(lam - now.log_snr) / h for lam, _ in others]
    powers = np.vander(ratios, increasing=True).T
    weights = [0.5] if len(ratios) == 1 else np.linalg.solve(powers, _moments(h, len(ratios))).tolist()
    slopes = ((value - x0) / ratio for ratio, (_, value) in zip(ratios, others))
    return -then.alpha * math.expm1(-h) * sum(weight * slope for weight, slope in zip(weights, slopes))


def _moments(h: float, count: int) -> list[float]:
    """n! phi_{n+1}(-h) / phi_1(-h) for n = 1 .. count: what the weights must reproduce for x0 = lambda**n."""
    moments, phi = [], math.expm1(-h)
    for n in range(1, count + 1):
        phi = phi / -h - 1 / math.factorial(n)
        moments.append(math.factorial(n) * phi / math.expm1(-h))
    return moments
