"""Weights on disk: files and folders of them as memory-mapped tensors, and what kind of model they are.

A `.ckpt` is read as data and never unpickled by Python (`ldm.checkpoint.unpickle`); the formats are in
`ldm.checkpoint.archive`, foreign names in `ldm.checkpoint.names`, the kinds of model in `ldm.checkpoint.families`,
the folders of the diffusers library in `ldm.checkpoint.diffusers`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.archive import MappedFile, read_archive
from ldm.checkpoint.diffusers import INDEX, MappedFolder, read_folder
from ldm.checkpoint.families import EMBEDDING, FAMILIES, UNKNOWN, Family, identify
from ldm.checkpoint.names import has_ema, rename, select_ema
from ldm.checkpoint.unpickle import StandIn
from ldm.errors import CheckpointError

__all__ = ["FAMILIES", "UNKNOWN", "Checkpoint", "Family", "checkpoint_hash", "identify", "open_checkpoint",
           "read_checkpoint", "read_object"]


@dataclass(frozen=True)
class Checkpoint:
    """An open weights file or folder.

    tensors: its weights under the names of our modules, as views of the mapped files. outline: the same on the meta
    device, for their shapes and types alone.
    """

    file: MappedFile | MappedFolder
    tensors: Mapping[str, Tensor]
    outline: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def has_ema(self) -> bool:
        return has_ema(self.tensors)

    @cached_property
    def family(self) -> Family:
        return identify({key: tuple(weight.shape) for key, weight in self.outline.items()})

    @property
    def sha256(self) -> str:
        return checkpoint_hash(self.path)

    def release(self, tensor: Tensor) -> None:
        """Let the system take back the memory behind one of the tensors, once it has been copied."""
        self.file.release(tensor)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a weights file without reading its numbers: they are fetched where and when they are used.

    Takes PyTorch files, zip or older, and safetensors; weights wrapped in `state_dict` or bare; and folders in the
    layout of the diffusers library. Raises CheckpointError with what the file is if not that, and UnsafeCheckpoint,
    with nothing executed, if it asks to run code.
    """
    if (Path(path) / INDEX).is_file():
        joined = read_folder(Path(path))
        return Checkpoint(joined.folder, joined, joined.outline())
    file = _map(path)
    tree = read_archive(file)
    for _ in range(2):  # some files are wrapped twice; a hostile one may hold itself
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            tree = tree["state_dict"]
    entries = tree.items() if isinstance(tree, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{file.path} holds no weights by name, but {_what(tree)}: give a file that has a state dict")
    tensors = rename(tensors)
    return Checkpoint(file, tensors, {key: weight.to("meta") for key, weight in tensors.items()})


def read_checkpoint(path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """The weights of a file by our names, memory-mapped: copy what is to be kept.

    With `use_ema` the averaged weights stand in place of the plain ones, and the file must have them.
    """
    checkpoint = open_checkpoint(path)
    if not use_ema:
        return dict(checkpoint.tensors)
    if not checkpoint.has_ema:
        raise CheckpointError(f"{path} has no EMA weights, which --use_ema asks for: leave the option out")
    return select_ema(checkpoint.tensors)


def read_object(path: str | Path) -> Any:
    """Everything that a file holds: containers, tensors, and a StandIn for every other object. Nothing is executed."""
    return read_archive(_map(path))


def checkpoint_hash(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal, computed once a process; the community quotes its first 10 digits.

    Of a folder, that of the lines "hash  path" that sha256sum prints for the files that are read of it, in order.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(file.path.relative_to(path).as_posix() for file in read_folder(path).folder.files)
        lines = "".join(f"{checkpoint_hash(path / name)}  {name}\n" for name in names)
        return hashlib.sha256(lines.encode()).hexdigest()
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: str | Path) -> MappedFile:
    """Map a weights file, or say why there is none at this path."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder without {INDEX}: give the .ckpt or .safetensors file in it, "
                              "or the top folder of a model in the layout of diffusers")
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: put the weights there (for Stable Diffusion 1, "
            "models/ldm/stable-diffusion-v1/model.ckpt is where the scripts look), or give the path of another file")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: give a .ckpt or .safetensors file")
    try:
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty: download it again")
        return MappedFile(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _what(tree: Any) -> str:
    """What was found in place of a state dict."""
    if isinstance(tree, dict) and "string_to_param" in tree:
        return f"what a textual inversion has learned ({EMBEDDING})"
    if isinstance(tree, dict):
        keys = [repr(key)[:40] for key in list(tree)[:5]]
        return f"a mapping with {', '.join(keys) or 'nothing in it'}"
    return repr(tree)[:100] if isinstance(tree, StandIn) else f"a {type(tree).__name__}"
