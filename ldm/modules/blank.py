"""Building a network whose weights come from a file."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

RANDOM_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_)


class SkipRandomFills(TorchFunctionMode):
    """Leave tensors on the meta device as they are: they have no values, and filling one costs seconds at start-up,
    since torch answers `normal_` there through its compiler, which it imports for the purpose."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # The functions of torch.nn.init come here first, and what they call in turn does not.
        if func in RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def blank() -> Iterator[None]:
    """Modules built in here have their parameters on the meta device, with a shape and no memory."""
    with torch.device("meta"), SkipRandomFills():
        yield
