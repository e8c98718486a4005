"""Captioned pictures encoded once by an autoencoder: training on what is kept costs neither drawing nor encoding."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)


class CachedLatents(Dataset):
    """The moments of a dataset's pictures: {image: float32 (h, w, 2c), mean and log variance; caption: text}.

    path: a folder, filled at the first use from `source`, whose items hold `image` (h, w, 3) in [-1, 1] and `caption`,
    through `first_stage`, an autoencoder with a Gaussian latent; an interrupted filling goes on where it stopped.
    Neither is built where the folder is full.
    """

    def __init__(self, path: str, source: Mapping, first_stage: Mapping, batch_size: int = 16, num_workers: int = 0):
        self.folder = Path(path)
        if not (self.folder / "captions.json").exists():
            self.fill(instantiate_from_config(source), instantiate_from_config(first_stage), batch_size, num_workers)
        self.captions = json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))
        self.moments = np.load(self.folder / "moments.npy", mmap_mode="r")

    def fill(self, source: Dataset, first_stage: torch.nn.Module, batch_size: int, num_workers: int) -> None:
        """Encode every picture into moments.npy, float16 (n, h, w, 2c)."""
        encode = encoder(first_stage)

        def batches(start: int) -> Batches:
            rest = torch.utils.data.Subset(source, range(start, len(source)))
            for batch in DataLoader(rest, batch_size, num_workers=num_workers):
                yield {"moments": encode(batch["image"])}, batch["caption"]

        fill(self.folder, len(source), batches)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.moments[index].astype(np.float32), "caption": self.captions[index]}


Batches = Iterator[tuple[dict[str, np.ndarray], list[str]]]  # arrays (b, ...) by name, and captions


def encoder(first_stage: torch.nn.Module) -> Callable[[Tensor], np.ndarray]:
    """What turns pictures (b, h, w, 3) in [-1, 1] into moments, float16 (b, h / f, w / f, 2c).

    It runs where there is a GPU, if there is one, and in bfloat16, of which float16 keeps every digit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first_stage = first_stage.eval().to(device, torch.bfloat16, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(pictures: Tensor) -> np.ndarray:
        posterior = first_stage.encode(pictures.movedim(-1, 1).to(device))
        return posterior.parameters.movedim(1, -1).half().cpu().numpy()

    return encode


def fill(folder: Path, n: int, batches: Callable[[int], Batches]) -> None:
    """Write n examples into a folder: <name>.npy for each array, float16, and last captions.json: all are there.

    batches(start) goes through the examples from number `start` on: an interrupted filling goes on where it stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    captions = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else []
    fresh, files = not captions, {}
    for number, (arrays, texts) in enumerate(batches(len(captions))):
        for name, rows in arrays.items():
            if name not in files:
                files[name] = partial_array(folder / f"{name}.npy", (n, *rows.shape[1:]), fresh)
            files[name][len(captions):len(captions) + len(rows)] = rows
        captions += texts
        if number % 16 == 15:
            for file in files.values():
                file.flush()
            write(progress, captions)
            logger.info("%s: %d of %d examples", folder, len(captions), n)
    for file in files.values():
        file.flush()
    write(folder / "captions.json", captions)
    progress.unlink(missing_ok=True)


def partial_array(path: Path, shape: tuple[int, ...], fresh: bool) -> np.memmap:
    """A float16 array on the disk to be filled: a new one, or that of an interrupted filling."""
    if fresh:
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    return np.load(path, mmap_mode="r+")


def write(path: Path, captions: list[str]) -> None:
    """Replace a file of captions at once."""
    path.with_suffix(".new").write_text(json.dumps(captions), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)
