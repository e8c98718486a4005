"""Captioned pictures of one's own: a folder, or tar shards in the webdataset form.

Both give {image: float32 (size, size, 3) in [-1, 1], caption: text}; the two keys can be named otherwise.
"""

import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from random import Random

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ldm.errors import RequestError
from ldm.image.io import read_image, to_array

logger = logging.getLogger(__name__)

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))
TABLES = ("metadata.jsonl", "captions.jsonl")


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of a picture at size x size pixels (Lanczos), as float32 in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_array(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


class CaptionFolder(Dataset):
    """The pictures of a folder and of those in it, in the order of their names.

    A caption stands in a .txt file beside its picture, or in metadata.jsonl in the folder: a line of JSON a picture,
    with file_name and text. Raises RequestError where there are no pictures, or some have no caption.
    """

    def __init__(self, root: str, size: int = 512, image_key: str = "image", caption_key: str = "txt"):
        self.size, self.image_key, self.caption_key = size, image_key, caption_key
        folder = Path(root)
        table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
        rows = map(json.loads, table.read_text(encoding="utf-8").splitlines()) if table else ()
        captions = {folder / row["file_name"]: row["text"] for row in rows}
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not self.paths:
            raise RequestError(f"there are no pictures in {folder}: it must hold {', '.join(sorted(PICTURES))} files")
        silent = [path for path in self.paths if path not in captions and not path.with_suffix(".txt").is_file()]
        if silent:
            raise RequestError(f"{len(silent)} pictures in {folder} have no caption, e.g. {silent[0]}: "
                               f"put a .txt file beside each, or list them in {TABLES[0]}")
        self.captions = captions

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        path = self.paths[index]
        caption = self.captions.get(path) or path.with_suffix(".txt").read_text(encoding="utf-8")
        return {self.image_key: squared(read_image(path), self.size), self.caption_key: caption.strip()}


class CaptionShards(IterableDataset):
    """The pictures of tar files on this machine, read from front to back and again without end.

    shards: paths, which may have wildcards and ranges {00000..00127}. Files of one name are one example: a picture, and
    the caption in .txt, or in .json under `json_key`. Workers and ranks share the shards, whose order is drawn anew
    each round; `shuffle` is how many examples are mixed. What cannot be read is left out with a warning.
    """

    def __init__(
        self, shards: str | Sequence[str], size: int = 512, shuffle: int = 1000, seed: int = 0,
        image_key: str = "image", caption_key: str = "txt", json_key: str = "caption",
    ):
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.image_key, self.caption_key, self.json_key = image_key, caption_key, json_key
        patterns = [shards] if isinstance(shards, str) else shards
        self.shards = sorted({path for pattern in patterns for name in spelt_out(pattern) for path in glob.glob(name)})
        if not self.shards:
            raise RequestError(f"there are no tar files at {', '.join(patterns)}")

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        turn, readers = (worker.id, worker.num_workers) if worker else (0, 1)
        if dist.is_available() and dist.is_initialized():
            turn, readers = turn + dist.get_rank() * readers, readers * dist.get_world_size()
        if readers > len(self.shards):
            raise RequestError(f"{readers} readers cannot share {len(self.shards)} tar files: use fewer workers")
        rng = Random(f"{self.seed}/{turn}")
        return mixed(self.examples(self.shards[turn::readers], rng), self.shuffle, rng)

    def examples(self, shards: list[str], rng: Random) -> Iterator[dict]:
        for _ in itertools.count():
            found = False
            for shard in rng.sample(shards, len(shards)):
                for name, files in grouped(shard):
                    example = self.example(f"{shard}: {name}", files)
                    found = found or example is not None
                    if example is not None:
                        yield example
            if not found:
                raise RequestError(f"no picture with a caption can be read from {', '.join(shards)}")

    def example(self, name: str, files: dict[str, bytes]) -> dict | None:
        """An example from the files of one name by their suffixes, None where they make none."""
        picture = next((files[suffix] for suffix in files if suffix in PICTURES), None)
        try:
            caption = files[".txt"].decode() if ".txt" in files else json.loads(files[".json"])[self.json_key]
            if picture is None:
                raise KeyError("picture")
            with Image.open(io.BytesIO(picture)) as opened:
                image = squared(ImageOps.exif_transpose(opened).convert("RGB"), self.size)
        except (KeyError, ValueError, OSError, Image.DecompressionBombError) as error:
            logger.warning("left out %s: %s: %s", name, type(error).__name__, error)
            return None
        return {self.image_key: image, self.caption_key: caption.strip()}


def spelt_out(pattern: str) -> list[str]:
    """A pattern with each range {00000..00127} replaced by its numbers."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [path for number in numbers for path in spelt_out(pattern[:match.start()] + number + pattern[match.end():])]


def grouped(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The files of a tar, {suffix: content}, of one name after another; the files of a name stand together."""
    with tarfile.open(shard, mode="r|*") as tar:
        members = ((member, tar.extractfile(member).read()) for member in tar if member.isfile())
        named = ((*os.path.splitext(PurePosixPath(member.name).as_posix()), content) for member, content in members)
        for name, files in itertools.groupby(named, key=lambda file: file[0]):
            yield name, {suffix.lower(): content for _, suffix, content in files}


def mixed(examples: Iterator[dict], window: int, rng: Random) -> Iterator[dict]:
    """The same examples, each drawn at random from a window of those that come next; in their order without one."""
    waiting = list(itertools.islice(examples, window))
    for example in examples:
        if waiting:
            place = rng.randrange(len(waiting))
            waiting[place], example = example, waiting[place]
        yield example
    rng.shuffle(waiting)
    yield from waiting
