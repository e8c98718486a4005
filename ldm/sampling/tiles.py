"""A network that is asked for a large latent in overlapping tiles, whose answers are blended at every step.

The sampler and its noise know nothing of the tiles (after Bar-Tal et al. 2023, eq. 5, with soft edges).
"""

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ldm.sampling.guidance import ApplyModel

OVERLAP = 4  # neighbours share at least a quarter of a tile's side


def tiled(apply_model: ApplyModel, side: int, step: int = 1) -> ApplyModel:
    """Ask `apply_model` tile by tile where a latent is longer than `side`; what is joined by channel is cut alike.

    step: of the places where tiles begin, by how much the network halves sides. Elsewhere its coarse levels fall on
    other places than they do in the whole latent, and the answers differ twice as much.
    """

    @cache
    def layout(height: int, width: int, device: torch.device) -> tuple[list[tuple], Tensor, Tensor]:
        """The places of the tiles, how much each place of one counts, and the sum of that over all; of every step."""
        corners = itertools.product(starts(height, side, step), starts(width, side, step))
        places = [(..., slice(top, top + side), slice(left, left + side)) for top, left in corners]
        weight = ramp(min(side, height), device)[:, None] * ramp(min(side, width), device)
        weights = torch.zeros(1, 1, height, width, device=device)
        for place in places:
            weights[place] += weight
        return places, weight, weights

    def predict(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        height, width = x.shape[-2:]
        if max(height, width) <= side:
            return apply_model(x, t, cond)
        places, weight, weights = layout(height, width, x.device)
        total = torch.zeros_like(x)
        for place in places:
            total[place] += weight * apply_model(x[place], t, cut(cond, place))
        return total / weights

    return predict


def starts(length: int, side: int, step: int = 1) -> list[int]:
    """Where the tiles of one direction begin: as few as overlap enough, evenly spread, at multiples of `step`."""
    if length <= side:
        return [0]
    most = max(step, (side - side // OVERLAP) // step * step)  # from one to the next
    count = -(-(length - side) // most) + 1
    return [min(-(-i * (length - side) // ((count - 1) * step)) * step, length - side) for i in range(count)]


def ramp(side: int, device: torch.device) -> Tensor:
    """How much each place of a tile counts, (side,): it falls off linearly towards both ends."""
    place = torch.arange(side, device=device) + 0.5
    return torch.minimum(place, side - place).div(max(1, side // OVERLAP)).clamp(max=1)


def cut(cond: Any, place: tuple) -> Any:
    """A conditioning whose c_concat is that of a tile."""
    if not isinstance(cond, Mapping) or not cond.get("c_concat"):
        return cond
    return {**cond, "c_concat": [one[place] for one in cond["c_concat"]]}
