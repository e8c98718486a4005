"""Captioned pictures encoded once by an autoencoder: training on what is kept costs neither drawing nor encoding."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Dataset

from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)


Examples = Iterator[tuple[dict[str, np.ndarray], list[str]]]  # arrays (b, ...) by name, and captions


class CachedLatents(Dataset):
    """The moments of a dataset's pictures: {image: float32 (h, w, 2c), mean and log variance; caption: text}.

    path: a folder, filled at the first use from `source`, whose items hold `image` (h, w, 3) in [-1, 1] and `caption`,
    through `first_stage`, an autoencoder with a Gaussian latent; an interrupted filling goes on where it stopped.
    Neither is built where the folder is full. device: where it is filled, by default a GPU if there is one.
    """

    def __init__(self, path: str, source: Mapping, first_stage: Mapping, batch_size: int = 16, num_workers: int = 0,
                 device: str | None = None):
        self.folder = Path(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if not (self.folder / "captions.json").exists():
            self.fill(instantiate_from_config(source), instantiate_from_config(first_stage), batch_size, num_workers)
        self.captions = json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))
        self.moments = np.load(self.folder / "moments.npy", mmap_mode="r")

    def fill(self, source: Dataset, first_stage: Module, batch_size: int, num_workers: int) -> None:
        """Write <name>.npy, float16, for each array of the `examples`; captions.json, the last file, says it is whole.

        The autoencoder runs in bfloat16, of which float16 keeps every digit.
        """
        first_stage = first_stage.eval().to(self.device, torch.bfloat16, memory_format=torch.channels_last)
        self.folder.mkdir(parents=True, exist_ok=True)
        progress = self.folder / "progress.json"
        captions = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else []
        rest = torch.utils.data.Subset(source, range(len(captions), len(source)))
        begun, files = bool(captions), {}
        loader = DataLoader(rest, batch_size, num_workers=num_workers)
        for number, (arrays, texts) in enumerate(self.examples(loader, first_stage, len(captions))):
            for name, rows in arrays.items():
                if name not in files:
                    files[name] = partial_array(self.folder / f"{name}.npy", (len(source), *rows.shape[1:]), begun)
                files[name][len(captions):len(captions) + len(rows)] = rows
            captions += texts
            if number % 16 == 15:
                for file in files.values():
                    file.flush()
                write(progress, captions)
                logger.info("%s: %d of %d pictures encoded", self.folder, len(captions), len(source))
        for file in files.values():
            file.flush()
        write(self.folder / "captions.json", captions)
        progress.unlink(missing_ok=True)

    def examples(self, batches: Iterable[Mapping], first_stage: Module, start: int) -> Examples:
        """The arrays and captions of each batch of `source`, from its item `start` on."""
        for batch in batches:
            yield {"moments": self.encode(first_stage, batch["image"])}, batch["caption"]

    @torch.no_grad()
    def encode(self, first_stage: Module, pictures: Tensor) -> np.ndarray:
        """The moments, float16 (b, h / f, w / f, 2c), of pictures (b, h, w, 3) in [-1, 1]."""
        posterior = first_stage.encode(pictures.movedim(-1, 1).to(self.device))
        return posterior.parameters.movedim(1, -1).half().cpu().numpy()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.moments[index].astype(np.float32), "caption": self.captions[index]}


def partial_array(path: Path, shape: tuple[int, ...], begun: bool) -> np.ndarray:
    """A float16 array on the disk to be filled: that of an interrupted filling, or a new one."""
    if begun:
        return np.load(path, mmap_mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def write(path: Path, captions: list[str]) -> None:
    """Replace a file of captions at once."""
    path.with_suffix(".new").write_text(json.dumps(captions), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)
