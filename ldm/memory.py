"""Where a model runs, in which precision and in which layout."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

from ldm.errors import DeviceError, OutOfMemory

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name` (auto, cpu, cuda, cuda:1, mps). Raises DeviceError where this machine has none."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"only {count}" if count else "none"
            raise DeviceError(f"{name} was asked for, but torch {torch.__version__} finds {have}; try --device cpu")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("mps was asked for, but this is no Mac with Metal; try --device cpu")
    elif device.type != "cpu":
        raise DeviceError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where a processor computes in it, fp16 on an accelerator, else full."""
    if name != "auto":
        return name
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "full"
    return "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The original's mixed precision where `precision` is autocast: float32 weights, cast at each use."""
    if precision != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if device.type == "cpu" else torch.float16)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device, its convolutions in channels_last, the layout that they compute in fastest."""
    with as_out_of_memory(f"{device} has no room for the model: try --precision bf16"):
        return model.to(device).to(memory_format=torch.channels_last)


@contextlib.contextmanager
def as_out_of_memory(message: str):
    """Turn each backend's way of saying that memory is short into OutOfMemory, with a message of what would help."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(message) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise OutOfMemory(message) from error
        raise
