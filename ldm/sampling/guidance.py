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
    without the picture to edit; image: that picture without the prompt. Each a tensor (b, ...), a list of them, or a
    dict of either (c_concat, c_crossattn, c_adm).
    """

    uncond: Any = None
    image: Any = None
    cond: Any = None


Ask = Callable[[Tensor, Tensor], Told]


@dataclass(frozen=True)
class Guidance:
    """One output from several: out = uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    Where a picture is edited, out = uncond + image_scale * (image - uncond) + scale * (cond - image) (Brooks et al.
    2023, eq. 3).
    """

    scale: float = 1.0
    image_scale: float | None = None

    def __call__(self, said: Told) -> Tensor:
        if said.uncond is None:
            return said.cond
        if said.image is None:
            return said.uncond + self.scale * (said.cond - said.uncond)
        seen = said.uncond + self.image_scale * (said.image - said.uncond)
        return seen + self.scale * (said.cond - said.image)


def ask(apply_model: ApplyModel, told: Told) -> Ask:
    """Bind conditionings to a network: (x (b, c, h, w), t (b,)) -> its output under each, in one call on all of them.

    Raises ValueError where their structures differ.
    """
    roles = [role for role, one in told._asdict().items() if one is not None]
    if roles in ([], ["cond"]):
        return lambda x, t: Told(cond=apply_model(x, t, told.cond))
    count, every = len(roles), reduce(stack, (getattr(told, role) for role in roles))

    def outputs(x: Tensor, t: Tensor) -> Told:
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
