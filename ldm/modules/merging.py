"""Token merging: pixels that are alike go through self-attention as one (Bolya & Hoffman 2023, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.modules.attention import SpatialTransformer

FEWEST = 64**2  # tokens; over fewer, attention takes too little time to be spared any


def places(x: Tensor, sides: tuple[int, int], share: float) -> tuple[Tensor, int]:
    """Where each token of x (b, n, c) goes, (b, n), among those that are left of n = height * width, and their count.

    The first pixel of each 2x2 cell stays; of the others, `share` of all tokens, the most alike, join the one of these
    that has the most similar direction.
    """
    (b, n, _), height, width = x.shape, *sides
    rows, columns = torch.arange(height, device=x.device) % 2, torch.arange(width, device=x.device) % 2
    corner = (rows[:, None] + columns == 0).flatten()
    stay, rest = corner.nonzero()[:, 0], (~corner).nonzero()[:, 0]
    gone = min(int(share * n), len(rest))
    unit = functional.normalize(x, dim=-1)
    alike, place = (unit[:, rest] @ unit[:, stay].transpose(1, 2)).max(dim=-1)  # (b, len(rest)) each
    order = alike.argsort(dim=1, descending=True, stable=True)
    alone = torch.arange(len(stay), n - gone, device=x.device).expand(b, -1)
    place.scatter_(1, order[:, gone:], alone)
    whole = place.new_empty(b, n)
    whole[:, stay] = torch.arange(len(stay), device=x.device)
    whole[:, rest] = place
    return whole, n - gone


def join(x: Tensor, place: Tensor, count: int) -> Tensor:
    """The mean of the tokens x (b, n, c) that share a place: (b, count, c)."""
    index = place[..., None].expand_as(x)
    total = torch.zeros(len(x), count, x.shape[2], device=x.device).scatter_add_(1, index, x.float())
    number = torch.zeros(len(x), count, device=x.device).scatter_add_(1, place, torch.ones_like(place).float())
    return (total / number[..., None]).to(x.dtype)


def spread(x: Tensor, place: Tensor) -> Tensor:
    """To each token what is at its place in x (b, count, c): (b, n, c)."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))


class Merging:
    """The hooks of one SpatialTransformer, which merge around the self-attention of each of its blocks."""

    def __init__(self, share: float):
        self.share = share
        self.used = False
        self.sides = 0, 0
        self.place: Tensor | None = None

    def look(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.sides = tuple(inputs[0].shape[2:])

    def before(self, attention: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        x, = inputs
        if x.shape[1] < FEWEST:
            return None
        self.used = True
        self.place, count = places(x, self.sides, self.share)
        return (join(x, self.place, count),)

    def after(self, attention: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        place, self.place = self.place, None
        return out if place is None else spread(out, place)


@contextmanager
def merging(network: nn.Module, share: float) -> Iterator[list[Merging]]:
    """Merge this share of the tokens, 0 to 0.75, in the network's large self-attentions inside the block.

    Gives what does so, which knows whether it was `used`. On a GPU the means are summed in no fixed order.
    """
    made, handles = [], []
    for layer in network.modules() if share else ():
        if isinstance(layer, SpatialTransformer):
            made.append(one := Merging(share))
            handles.append(layer.register_forward_pre_hook(one.look))
            for block in layer.transformer_blocks:
                if not block.disable_self_attn:
                    handles.append(block.attn1.register_forward_pre_hook(one.before))
                    handles.append(block.attn1.register_forward_hook(one.after))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
