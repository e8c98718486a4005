"""Guidance: the one place where what a network says under several conditionings becomes one output."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

ApplyModel = Callable[[Tensor, Tensor, Any], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


class Told(NamedTuple):
    """What a network is told, or what it says to each; None where it is not asked.

    cond: the prompt, and all else that it takes; uncond: the same without the prompt, or with a negative one, and
    without the picture to edit; image: that picture without the prompt; concept: what to keep away from, in place of
    the prompt. Each a tensor (b, ...), a list of them, or a dict of either (c_concat, c_crossattn, c_adm).
    """

    uncond: Any = None
    image: Any = None
    cond: Any = None
    concept: Any = None


Ask = Callable[..., Told]


@dataclass
class Away:
    """Keeps guidance away from a concept for one walk (Safe Latent Diffusion: Schramowski et al. 2023, eq. 3 to 8).

    scale, threshold: of the distance to the concept, at each place of the noise. warmup: calls that change nothing, but
    for the momentum, which enters by momentum_scale and keeps a share beta of itself.
    """

    scale: float
    warmup: int
    threshold: float
    momentum_scale: float
    beta: float
    momentum: Tensor | float = 0.0
    calls: int = 0

    def __call__(self, base: Tensor, cond: Tensor, concept: Tensor) -> Tensor:
        """What to take off cond - base, from the noise (b, c, h, w) that the network sees under each."""
        gap = cond - concept
        weight = torch.where(gap < self.threshold, (self.scale * gap).abs().clamp(max=1.0), 0.0)
        off = weight * (concept - base) + self.momentum_scale * self.momentum
        self.momentum = self.beta * self.momentum + (1 - self.beta) * off
        self.calls += 1
        return off if self.calls > self.warmup else torch.zeros_like(off)


@dataclass(frozen=True)
class Guidance:
    """One output from several: out = uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    Where a picture is edited, out = uncond + image_scale * (image - uncond) + scale * (cond - image) (Brooks et al.
    2023, eq. 3); where a concept is told, `away` takes its part off what scale multiplies.
    """

    scale: float = 1.0
    image_scale: float | None = None
    away: Away | None = None

    def __call__(self, said: Told, slope: float = 1.0) -> Tensor:
        """slope: how much noise a change of the output stands for (see `eps_slope`); 0 leaves the concept out."""
        if said.uncond is None:
            return said.cond
        base = seen = said.uncond
        if said.image is not None:
            base, seen = said.image, said.uncond + self.image_scale * (said.image - said.uncond)
        towards = said.cond - base
        if said.concept is not None and slope:
            towards = towards - self.away(*(slope * one for one in (base, said.cond, said.concept))) / slope
        return seen + self.scale * towards


def ask(apply_model: ApplyModel, told: Told) -> Ask:
    """Bind conditionings to a network: (x (b, c, h, w), t (b,), alone) -> its output under each, in one call on all.

    alone: ask for that of the prompt and nothing else, at a share of the cost.
    Raises ValueError where their structures differ.
    """
    roles = [role for role, one in told._asdict().items() if one is not None]
    if roles in ([], ["cond"]):
        return lambda x, t, alone=False: Told(cond=apply_model(x, t, told.cond))
    count, every = len(roles), reduce(stack, (getattr(told, role) for role in roles))

    def outputs(x: Tensor, t: Tensor, alone: bool = False) -> Told:
        if alone:
            return Told(cond=apply_model(x, t, told.cond))
        said = apply_model(torch.cat([x] * count), torch.cat([t] * count), every)
        return Told(**dict(zip(roles, said.chunk(count), strict=True)))

    return outputs


def guide(apply_model: ApplyModel, cond: Any, uncond: Any = None, scale: float = 1.0) -> Predict:
    """Bind a conditioning to a network: (x (b, c, h, w), t (b,)) -> its guided output.

    A negative prompt is an uncond. One plain call if scale is 1 or uncond is None.
    """
    outputs, guidance = ask(apply_model, Told(cond=cond, uncond=None if scale == 1 else uncond)), Guidance(scale)
    return lambda x, t: guidance(outputs(x, t))


def stack(first: Any, second: Any) -> Any:
    """Two conditionings of one structure as one batch, first before second.

    What is no tensor stays as the second has it. Raises ValueError where the structures differ.
    """
    match first, second:
        case dict(), dict():
            return {key: stack(first.get(key), value) for key, value in second.items()}
        case (list() | tuple()), (list() | tuple()):
            return [stack(one, other) for one, other in zip(first, second, strict=True)]
        case Tensor(), Tensor():
            return torch.cat([first, second])
        case _, (dict() | list() | tuple() | Tensor()):
            raise ValueError("the unconditional must have the structure of the conditional, "
                             f"got {type(first).__name__} beside {type(second).__name__}")
    return second
