"""Captioned pictures encoded once by an autoencoder: training on what is kept costs neither drawing nor encoding."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
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

    @torch.no_grad()
    def fill(self, source: Dataset, first_stage: torch.nn.Module, batch_size: int, num_workers: int) -> None:
        """Encode every picture into moments.npy, float16 (n, h, w, 2c); captions.json, the last file, says it is whole.

        The encoder runs where there is a GPU, if there is one, and in bfloat16, of which float16 keeps every digit.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        first_stage = first_stage.eval().to(device, torch.bfloat16, memory_format=torch.channels_last)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, progress = self.folder / "moments.npy", self.folder / "progress.json"
        captions = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else []
        rest = torch.utils.data.Subset(source, range(len(captions), len(source)))
        moments = np.load(partial, mmap_mode="r+") if captions else None
        for number, batch in enumerate(DataLoader(rest, batch_size, num_workers=num_workers)):
            pictures = batch["image"].movedim(-1, 1).to(device)
            found = first_stage.encode(pictures).parameters.movedim(1, -1).half().cpu().numpy()
            if moments is None:
                shape = (len(source), *found.shape[1:])
                moments = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            moments[len(captions):len(captions) + len(found)] = found
            captions += batch["caption"]
            if number % 64 == 63:
                moments.flush()
                write(progress, captions)
                logger.info("%s: %d of %d pictures encoded", self.folder, len(captions), len(source))
        moments.flush()
        write(self.folder / "captions.json", captions)
        progress.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.moments[index].astype(np.float32), "caption": self.captions[index]}


def write(path: Path, captions: list[str]) -> None:
    """Replace a file of captions at once."""
    path.with_suffix(".new").write_text(json.dumps(captions), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)
