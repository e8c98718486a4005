"""Where a model runs, in which precision and layout, and what it gives up where memory is short."""

import contextlib
import ctypes
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import DeviceError, OutOfMemory
from ldm.modules.attention_ops import set_attention
from ldm.modules.bands import set_band
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.packing import can_pack, pack, packable, unpack

logger = logging.getLogger(__name__)

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WORKING_SPACE = 3 << 30  # bytes beside the weights that a picture of 512x512 is drawn in without a thought of memory
LEAST_SPACE = 1 << 30  # and with `low`

# Of malloc.h: how many pieces come from the kernel one by one, and how many free bytes at the end are kept.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8

# Weights of this many bytes and more, of these layers, can wait in main memory.
LARGE = 1 << 18
WAITING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class Saving:
    """What is given up for memory; the picture stays the same up to rounding.

    band: the most entries that the autoencoder's layers take in at once (`ldm.modules.bands`). stages, network: whether
    the text encoder and the autoencoder, and the blocks of the UNet, wait in main memory, from where each layer's
    weight visits the device while it runs. With `network`, weights also stay in the mapped file where they can.
    """

    band: int
    stages: bool = False
    network: bool = False


SAVINGS = {"auto": Saving(2**26), "low": Saving(2**22, stages=True), "lowest": Saving(2**21, stages=True, network=True)}


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


def free_memory(device: torch.device) -> int:
    """The bytes that are left on a device; on the CPU those that can be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # no Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


def pick_memory(name: str, device: torch.device, weights: int, held: int = 0) -> str:
    """What `auto` means for a model of so many bytes: itself where they and a picture fit, else low, else lowest.

    held: the bytes in use now that the model may have.
    """
    if name != "auto":
        return name
    free = free_memory(device) + held - weights
    picked = "auto" if free >= WORKING_SPACE else "low" if free >= LEAST_SPACE else "lowest"
    if picked != "auto":
        logger.info("%s has %.1f GB left beside the model: taking --memory %s", device, max(free, 0) / 1e9, picked)
    return picked


def keep_freed_memory(most: int = WORKING_SPACE // 4) -> None:
    """Let the C library of Linux keep what tensors leave for the next ones, up to `most` bytes, while the process runs.

    By default it hands each large piece back at once, and the kernel clears the same pages anew for every layer. The
    thread of a backward pass gets no pool of its own, which would not hold the larger ones.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, most)
        mallopt(M_ARENA_MAX, 1)


def pick_attention(device: torch.device, saving: Saving) -> str:
    """The method of `ldm.modules.attention_ops` that is fastest on a device, or that spares its memory."""
    if device.type == "mps":  # whose fused kernel stores all scores
        return "sliced" if saving.stages else "sdpa"
    able = torch.cpu.get_capabilities()
    return "cached" if device.type == "cpu" and able.get("avx512_bf16") and not able.get("amx_bf16") else "sdpa"


def place(model: nn.Module, device: torch.device, memory: str = "auto") -> nn.Module:
    """Move a model to its device, its convolutions in channels_last, the layout that they compute in fastest.

    memory: auto, low or lowest (see Saving); its settings of bands and attention hold for the whole process. It may be
    called again with a lower one, for a model that proved too large. With auto, and memory for it, the denoiser's
    weights are kept in a second layout on processors that gain by it (`ldm.modules.packing`).
    """
    saving = SAVINGS[memory]
    set_band(saving.band)
    set_attention(pick_attention(device, saving))
    waiting = wait(model, device, saving) if device.type != "cpu" else set()

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) in waiting:
            return tensor.to("cpu")
        if tensor.ndim != 4:
            return tensor.to(device)
        # In the layout of the file, mapped weights stay in it.
        return tensor.to(device, memory_format=torch.contiguous_format if saving.network else torch.channels_last)

    with as_out_of_memory(f"{device} has no room for the model: try --memory lowest or --precision bf16"):
        model._apply(move)
    if device.type == "cpu":
        network = model.model.diffusion_model
        unpack(network)
        second = sum(layer.weight.nbytes for layer in packable(network))
        if not saving.stages and can_pack() and free_memory(device) >= WORKING_SPACE + second:
            pack(network)
    return model


@contextlib.contextmanager
def lowest(model: nn.Module, usual: str) -> Iterator[None]:
    """Let a model get by with the least memory inside the block; after it, as with `usual` (auto, low) again."""
    place(model, model.device, "lowest")
    try:
        yield
    finally:
        place(model, model.device, usual)


def wait(model: nn.Module, device: torch.device, saving: Saving) -> set[int]:
    """Let the large weights of what a model rests visit the device only while their layers run; gives their ids."""
    resting: list[nn.Module] = []
    if saving.stages:
        names = ("cond_stage_model", "first_stage_model", *getattr(model, "extra_stages", ()))
        for stage in {getattr(model, name, None) for name in names} - {None}:
            halves = [getattr(stage, name) for name in ("encoder", "decoder") if hasattr(stage, name)]
            if isinstance(stage, AbstractEncoder):
                stage.device = device
            # Of an autoencoder only the halves: its codebook is read without being called.
            resting += halves if len(halves) == 2 else [stage]
    if saving.network:
        unet = model.model.diffusion_model
        resting += [getattr(unet, n) for n in ("input_blocks", "middle_block", "output_blocks") if hasattr(unet, n)]
    # By exact type: a subclass may do with its weight what it likes.
    layers = {layer for module in resting for layer in module.modules() if type(layer) in WAITING}
    large = [layer for layer in layers if layer.weight.nbytes >= LARGE]
    for layer in large:
        if not any(isinstance(hook, Visit) for hook in layer._forward_pre_hooks.values()):
            visit = Visit(device)
            layer.register_forward_pre_hook(visit)
            layer.register_forward_hook(visit.end, always_call=True)
    return {id(layer.weight) for layer in large}


class Visit:
    """The hooks of one layer, whose weight is on the device while it runs and in main memory otherwise."""

    def __init__(self, device: torch.device):
        self.device = device
        self.home: nn.Parameter | None = None

    def __call__(self, layer: nn.Module, inputs: tuple) -> None:
        self.home = layer.weight
        layer.weight = nn.Parameter(self.home.to(self.device), requires_grad=False)

    def end(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        layer.weight = self.home


@contextlib.contextmanager
def as_out_of_memory(message: str):
    """Turn each backend's way of saying that memory is short into OutOfMemory: a message, and what was asked for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error)
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in said and "out of memory" not in said:
            raise
        raise OutOfMemory(message + asked_for(said)) from error


def asked_for(said: str) -> str:
    """How much memory was asked for when there was none left, as far as a backend's message says so."""
    found = re.search(r"(?i)tried to allocate ([\d.]+) ?([KMGT]?i?B|bytes)", said)
    if not found:
        return ""
    size = float(found[1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(found[2][0], 1)
    told = f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
    return f" (the piece that did not fit is of {told})"
