"""Classifier-free guidance: the one place where a conditional and an unconditional output meet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ApplyModel = Callable[[Tensor, Tensor, Any], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


def guide(apply_model: ApplyModel, cond: Any, uncond: Any = None, scale: float = 1.0) -> Predict:
    """Bind a conditioning to a network: (x (b, c, h, w), t (b,)) -> out = uncond + scale * (cond - uncond).

    cond, uncond: a tensor (b, ...), a list of them, or a dict of either (c_concat, c_crossattn, c_adm); a negative
    prompt is an uncond. One call on the batch [uncond, cond]; one plain call if scale is 1 or uncond is None
    (Ho & Salimans 2022, eq. 6, with scale = 1 + w).
    """
    if uncond is None or scale == 1:
        return lambda x, t: apply_model(x, t, cond)
    both = stack(uncond, cond)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without, given = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (given - without)

    return predict


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
