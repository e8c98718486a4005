"""Weights written to disk one tensor at a time, under a hidden name until the whole is there."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from ldm.checkpoint import Checkpoint, read_object
from ldm.checkpoint.archive import SAFETENSORS_TYPES
from ldm.checkpoint.diffusers import REST
from ldm.checkpoint.names import COMPUTED, EMA, select_ema
from ldm.errors import CheckpointError, OutputError

SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip
ALIGNMENT = 64  # bytes, of a tensor within a .ckpt, as torch.save has it
COUNTERS = ("epoch", "global_step")  # of training, whole numbers in a .ckpt


@dataclass(frozen=True)
class Recipe:
    """A weight to be written: the name of the one it is made of, and how."""

    source: str
    make: Callable[[Tensor], Tensor]

    def then(self, more: Callable[[Tensor], Tensor]) -> "Recipe":
        return Recipe(self.source, lambda weight: more(self.make(weight)))


Recipes = Mapping[str, Recipe]


def select(checkpoint: Checkpoint, ema: bool | None = None, dtype: torch.dtype | None = None) -> dict[str, Recipe]:
    """What is written of a checkpoint, and as what.

    ema: True puts the averaged weights in place of the plain ones, False leaves them out, None keeps both. dtype: of
    every weight of floating point but what a model computes by itself, such as its schedule, which stays exact.
    Raises CheckpointError for averaged weights that are not there.
    """
    names = {name: name for name in checkpoint.tensors}
    if ema and not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.path} has no EMA weights, which --ema asks for: leave the option out")
    if ema:
        names = select_ema(names)
    elif ema is False:
        names = {name: name for name in names if not name.startswith(EMA)}
    return {name: Recipe(source, cast(name, dtype)) for name, source in names.items()}


def cast(name: str, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Turn a weight into `dtype`. Raises OutputError where a number is too large for it."""
    exact = dtype is None or COMPUTED.fullmatch(name) or name == f"{EMA}decay"

    def make(weight: Tensor) -> Tensor:
        if exact or not weight.is_floating_point():
            return weight
        made = weight.to(dtype)
        if not made.is_meta and not made.isfinite().all() and weight.isfinite().all():
            raise OutputError(f"{name} reaches {weight.abs().max():.3g}, which {dtype} cannot hold: take --bf16")
        return made

    return make


def outline(checkpoint: Checkpoint, recipes: Recipes) -> dict[str, Tensor]:
    """Each weight to be written on the meta device: its shape and type."""
    return {name: recipe.make(checkpoint.outline[recipe.source]) for name, recipe in recipes.items()}


def write_numbers(file: BinaryIO, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Write the bytes of one weight, and let go of the memory behind what it was made of."""
    weight = checkpoint.tensors[recipe.source]
    made = recipe.make(weight).contiguous()
    file.write(memoryview(made.reshape(-1).view(torch.uint8).numpy()))
    checkpoint.release(weight)


def write_safetensors(path: Path, checkpoint: Checkpoint, recipes: Recipes, notes: Mapping[str, str]) -> None:
    """Write the weights, the widest types first so that each lies at a multiple of its size. notes: the metadata."""
    shapes = outline(checkpoint, recipes)
    order = sorted(recipes, key=lambda name: -shapes[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    end = 0
    for name in order:
        start, end = end, end + shapes[name].nbytes
        kind = known(SAFETENSORS_NAMES, name, shapes[name], "safetensors")
        header[name] = {"dtype": kind, "shape": list(shapes[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            write_numbers(file, checkpoint, recipes[name])
        sync(file)


def write_ckpt(path: Path, checkpoint: Checkpoint, recipes: Recipes, notes: Mapping[str, str]) -> None:
    """Write {"state_dict": weights, **notes} as torch.save does: a zip of a pickle and a record for each weight."""
    shapes = outline(checkpoint, recipes)
    state = {name: Stored(str(index), known(STORAGES, name, shapes[name], ".ckpt"), shapes[name])
             for index, name in enumerate(recipes)}
    beside = {name: int(note) if name in COUNTERS and note.isdigit() else note for name, note in notes.items()}
    with open(path, "xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("archive/data.pkl", "w") as record:
                Pickler(record, protocol=2).dump({**beside, "state_dict": state})
            archive.writestr("archive/byteorder", "little")
            for index, recipe in enumerate(recipes.values()):
                with archive.open(aligned(f"archive/data/{index}", file.tell()), "w", force_zip64=True) as record:
                    write_numbers(record, checkpoint, recipe)
            archive.writestr("archive/version", "3\n")
        sync(file)


class Storage:
    """Stands in a pickle for the numbers of a weight, which are a record of their own."""

    def __init__(self, key: str, kind: type, count: int):
        self.identity = ("storage", kind, key, "cpu", count)


class Stored:
    """Stands in a pickle for a weight: a contiguous view of a whole storage."""

    def __init__(self, key: str, kind: type, shape: Tensor):
        self.storage, self.shape = Storage(key, kind, shape.numel()), shape.shape

    def __reduce__(self):
        stride = torch.empty(self.shape, device="meta").stride()
        return _rebuild_tensor_v2, (self.storage, 0, tuple(self.shape), stride, False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.identity if isinstance(obj, Storage) else None


def aligned(name: str, start: int) -> zipfile.ZipInfo:
    """A record whose header, at byte `start`, is filled up so that its content lies at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name)
    header = 30 + len(name) + 20 + 4  # fixed part, name, sizes in 64 bits, head of the filling
    filling = -(start + header) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, filling) + b"Z" * filling
    return info


def known(kinds: Mapping[torch.dtype, Any], name: str, shape: Tensor, form: str) -> Any:
    if shape.dtype not in kinds:
        raise CheckpointError(f"{name} is of {shape.dtype}, which a {form} file cannot hold: take --half or --full")
    return kinds[shape.dtype]


def sync(file) -> None:
    """See to it that what was written is on the disk before the file gets its name."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def unfinished(path: Path, size: int, force: bool = False) -> Iterator[Path]:
    """A hidden path to write a file or folder to, which becomes `path` at the end of the block, or is gone.

    size: bytes that must be free. force: what is at `path` is replaced. Raises OutputError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if not force and os.path.lexists(path):
            raise OutputError(f"{path} is already there and was left as it is: choose another name, or take --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OutputError(f"{path} needs {size:,} bytes, and {path.parent} has {free:,} left: free some, "
                              "or write half precision with --half")
        try:
            yield temporary
            replace(temporary, path)
        finally:
            remove(temporary)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def replace(new: Path, path: Path) -> None:
    """Give `new` the name `path`. A folder cannot take the place of another in one move, so that one steps aside."""
    if not path.is_dir() or path.is_symlink():
        new.replace(path)
        return
    aside = new.with_suffix(".old")
    path.rename(aside)
    new.rename(path)
    remove(aside)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_notes(checkpoint: Checkpoint) -> dict[str, str]:
    """What a file says beside its weights in words and numbers: safetensors metadata, the counters of training."""
    path = checkpoint.path
    if path.is_dir():
        path = path / REST
        if not path.is_file():
            return {}
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
    except SafetensorError:
        tree = read_object(path)
        notes = tree if isinstance(tree, dict) and "state_dict" in tree else {}
    return {name: note if isinstance(note, str) else json.dumps(note) for name, note in notes.items()
            if isinstance(name, str) and isinstance(note, (str, int, float)) and name != "format"}
