"""The three file formats of weights, read as tensors that are views of the memory-mapped file.

zip: what torch.save has written since 1.6, a pickle and one uncompressed record a storage. legacy: what it wrote
before, a row of pickles and then the storages. safetensors: a JSON header and then the numbers.
"""

import io
import json
import mmap
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.unpickle import unpickle
from ldm.errors import CheckpointError, UnsafeCheckpoint

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
DESCRIPTION_LIMIT = 100 << 20  # bytes; the pickle or the header of a full training checkpoint has two million at most

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}

# What people have been seen to pass for weights, by its first bytes.
OTHER_FILES = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89HDF": "an HDF5 file: get the .ckpt or .safetensors file of the model",
    b"GGUF": "a GGUF file: get the .ckpt or .safetensors file of the model",
    b"\x89PNG": "a picture: give the weights file",
    b"\xff\xd8\xff": "a picture: give the weights file",
}
WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")
GIT_LFS = b"version https://git-lfs"


class MappedFile:
    """A file mapped privately into memory: its tensors are views, and writing to one never reaches the disk."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.size = len(self.map)
        self.address = torch.frombuffer(self.map, dtype=torch.uint8, count=1).data_ptr()

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")

    def cut_short(self, needed: int) -> CheckpointError:
        return self.error(f"is cut short: it needs {needed:,} bytes and has {self.size:,}; download it again")

    def bytes(self, offset: int, count: int) -> bytes:
        """Some bytes of a file's own description of itself; never those of its tensors."""
        if offset + count > self.size:
            raise self.cut_short(offset + count)
        if count > DESCRIPTION_LIMIT:
            raise self.error(f"describes itself in {count:,} bytes, which no weights need: download it again")
        return bytes(self.map[offset:offset + count])

    def view(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """`count` elements (count,) from byte `offset` on. Raises CheckpointError where the file ends before them."""
        end = offset + count * dtype.itemsize
        if end > self.size:
            raise self.cut_short(end)
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)

    def release(self, tensor: Tensor) -> None:
        """Give the memory behind a view back to the system; reading the view again fetches it from the file again."""
        if tensor.numel() and hasattr(mmap, "MADV_DONTNEED"):
            storage = tensor.untyped_storage()
            start = storage.data_ptr() - self.address
            page = start - start % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, page, start - page + storage.nbytes())


def read_archive(file: MappedFile) -> Any:
    """The object in a file of any of the three formats, told apart by content: the file's name does not matter.

    Raises CheckpointError with what the file is if it is not weights, and UnsafeCheckpoint if it asks to run code.
    """
    head = bytes(file.map[:512])
    for signature, what in OTHER_FILES.items():
        if head.startswith(signature):
            raise file.error(f"is {what}")
    if head[257:262] == b"ustar":
        raise file.error("is a tar archive: unpack it first, or convert a PyTorch file of before 2017 to .safetensors")
    if head.lstrip().lower().startswith(WEB_PAGE):
        raise file.error(f"is a web page ({_first_words(head)}), not weights: download the file itself")
    if head.startswith(GIT_LFS):
        raise file.error(f"is a git-lfs pointer ({_first_words(head)}), not weights: run `git lfs pull` in its folder")
    if head.startswith(b"PK"):
        return read_zip(file)
    pickled = head.startswith(b"\x80")
    if head[8:9] == b"{" or (file.path.suffix == ".safetensors" and not pickled):
        return read_safetensors(file)
    try:
        return read_legacy(file)
    except UnsafeCheckpoint:
        raise
    except CheckpointError:
        if pickled:
            raise
        what = f"text ({_first_words(head)})" if _is_text(head) else f"something that starts with {head[:8].hex(' ')}"
        raise file.error(f"is not a checkpoint but {what}: give a .ckpt or .safetensors file") from None


def read_zip(file: MappedFile) -> Any:
    """The object in a file of torch.save's zip form."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise file.error(f"is cut short or damaged: its {file.size:,} bytes hold no complete zip directory; "
                         "download it again") from error
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise file.error("is a zip archive without weights at its top (no data.pkl): unpack it first")
    root = roots[0]
    if root + "constants.pkl" in entries:
        raise file.error("is a TorchScript program, not plain weights: get the .ckpt or .safetensors file of the model")

    def place(name: str) -> tuple[int, int]:
        """Where the bytes of a record start, and how many there are."""
        entry = entries.get(root + name)
        if entry is None:
            raise file.error(f"is damaged: its record {name} is missing; download it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise file.error("is a compressed or encrypted zip archive, which torch.save never writes: unpack it first")
        header = file.bytes(entry.header_offset, 30)
        if not header.startswith(b"PK\x03\x04"):
            raise file.error(f"is damaged at its record {name}: download it again")
        return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])), entry.file_size

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        offset, size = place(f"data/{key}")
        if count * dtype.itemsize > size:
            raise file.error(f"is damaged: {count:,} x {dtype} in a record of {size:,} bytes; download it again")
        return file.view(dtype, offset, count)

    if root + "byteorder" in entries and file.bytes(*place("byteorder")) != sys.byteorder.encode():
        raise file.error("was written on a machine of another byte order: convert it to .safetensors there")
    return unpickle(io.BytesIO(file.bytes(*place("data.pkl"))), storage, file.path)


def read_legacy(file: MappedFile) -> Any:
    """The object in a file of torch.save's older form: magic number, version, system, object, keys, storages.

    Where a storage lies is known only after the object has been read, so it is read twice: first for the types alone.
    """
    stream = file.map
    stream.seek(0)
    if unpickle(stream, source=file.path) != LEGACY_MAGIC:
        raise file.error("is a pickle that torch.save did not write: give a .ckpt or .safetensors file")
    version, system = (unpickle(stream, source=file.path) for _ in range(2))
    if version != LEGACY_VERSION or not isinstance(system, dict):
        raise file.error(f"is not of version {LEGACY_VERSION} of PyTorch's older form, the only one: download it again")
    if system.get("little_endian", True) != (sys.byteorder == "little"):
        raise file.error("was written on a machine of another byte order: convert it to .safetensors there")
    start = stream.tell()
    types: dict[str, torch.dtype] = {}

    def measure(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if types.setdefault(key, dtype) != dtype:
            raise file.error(f"is damaged: its storage {key} is of two types; download it again")
        if count * dtype.itemsize > file.size:
            raise file.cut_short(count * dtype.itemsize)
        return torch.empty(count, dtype=dtype, device="meta")

    unpickle(stream, measure, file.path)
    keys = unpickle(stream, source=file.path)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in types for key in keys):
        raise file.error("is damaged: its list of storages does not fit its tensors; download it again")
    places: dict[str, tuple[int, int]] = {}
    offset = stream.tell()
    for key in keys:
        count, = struct.unpack("<q", file.bytes(offset, 8))
        if count < 0:
            raise file.error(f"is damaged: its storage {key} has {count} elements; download it again")
        places[key] = offset + 8, count
        offset += 8 + count * types[key].itemsize
    if offset > file.size:
        raise file.cut_short(offset)

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        offset, present = places.get(key, (0, -1))
        if count > present:
            raise file.error(f"is damaged: {count:,} elements in its storage {key} of {present:,}; download it again")
        return file.view(dtype, offset, count)

    stream.seek(start)
    return unpickle(stream, storage, file.path)


def read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name."""
    length, = struct.unpack("<Q", file.bytes(0, 8))
    try:
        header = json.loads(file.bytes(8, length))
        entries = {name: _safetensors_entry(**entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise file.error(f"is not a readable safetensors file (its header is damaged: {str(error)[:100]}): "
                         "download it again") from error
    return {
        name: file.view(dtype, 8 + length + offset, torch.Size(shape).numel()).reshape(shape)
        for name, (dtype, shape, offset) in entries.items()
    }


def _safetensors_entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[torch.dtype, list[int], int]:
    """One entry of the header as type, shape and first byte. Raises ValueError where its numbers contradict."""
    begin, end = data_offsets
    numbers = (begin, end, *shape)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError(f"shape {shape} at bytes {data_offsets}")
    count = 1
    for side in shape:
        count *= side
    if count * SAFETENSORS_TYPES[dtype].itemsize != end - begin:
        raise ValueError(f"shape {shape} of {dtype} at bytes {data_offsets}")
    return SAFETENSORS_TYPES[dtype], shape, begin


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-8", errors="ignore")
    return len(text.encode()) > len(head) - 4 and all(letter.isprintable() or letter.isspace() for letter in text)


def _first_words(head: bytes) -> str:
    """The start of a text in quotes, as one line."""
    words = " ".join(head.decode("utf-8", errors="replace").split())
    return repr(words[:60])
