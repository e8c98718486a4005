"""The Fréchet distance between two sets of pictures, on the features of a network that is named with every result."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ldm.errors import RequestError
from ldm.image.io import read_image
from ldm.util import optional

logger = logging.getLogger(__name__)

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity calls them
BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Features(Protocol):
    """A network that turns pictures into vectors.

    name: what results are called by; identity: what tells it from every other; resize: how it brings pictures to size.
    """

    name: str
    identity: str
    resize: str

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """One vector a picture: (b, d)."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """The Gaussian of the features of n pictures: mean (d,) and covariance (d, d), float64.

    features, resize: the identity of the network, and how it brought pictures to its size. source: what these are.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int
    features: str
    resize: str
    source: str

    def save(self, path: Path) -> Path:
        """Write an .npz that `load` reads."""
        facts = json.dumps({"n": self.n, "features": self.features, "resize": self.resize, "source": self.source})
        with open(path, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, facts=np.array(facts))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Raises RequestError for a file that does not say which features it holds."""
        try:
            with np.load(path, allow_pickle=False) as found:
                return cls(found["mu"], found["sigma"], **json.loads(str(found["facts"])))
        except FileNotFoundError as error:
            raise RequestError(f"there are no statistics at {path}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{path} are no statistics that evaluate.py wrote, which say what features they are of: "
                               "name the folder of the pictures instead") from error


def statistics(pictures: Iterable[Image.Image], features: Features, source: str) -> Statistics:
    """Fit a Gaussian to the features of pictures, a batch at a time. Raises RequestError for fewer than two."""
    pictures = iter(pictures)
    batches = iter(lambda: list(islice(pictures, BATCH)), [])
    found = [np.asarray(features(batch), np.float64) for batch in batches]
    n = sum(map(len, found))
    if n < 2:
        raise RequestError(f"a distance needs two pictures at least; {source} has {n}")
    vectors = np.concatenate(found)
    if n <= vectors.shape[1]:
        logger.warning("%d pictures are few for %d features: the distance is too large, and comparable at the same "
                       "number alone", n, vectors.shape[1])
    covariance = np.cov(vectors, rowvar=False)
    return Statistics(vectors.mean(axis=0), covariance, n, features.identity, features.resize, source)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Heusel et al. 2017, eq. 6).

    Raises RequestError for statistics of different features: such a number would mean nothing.
    """
    for name in ("features", "resize"):
        if getattr(first, name) != getattr(second, name):
            raise RequestError(f"{first.source} and {second.source} cannot be compared: {name} "
                               f"{getattr(first, name)!r} against {getattr(second, name)!r}")
    # tr (C1 C2)^½ = tr (R C2 R)^½ with R = C1^½, which is symmetric: its eigenvalues are real and not negative.
    values, vectors = np.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(0)).sum()
    away = first.mean - second.mean
    return float(away @ away + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def read_folder(folder: Path) -> Iterator[Image.Image]:
    """The pictures of a folder and the folders in it, in the order of their names. Raises RequestError for none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise RequestError(f"there are no pictures in {folder}")
    return map(read_image, paths)


def find_inception(given: str | None = None) -> Path | None:
    """The weights of torch-fidelity's Inception: the file that is named, else where torch.hub keeps them.

    None where they are not at hand: they are never fetched. Raises RequestError for a file that is named and not there.
    """
    if given:
        if not Path(given).is_file():
            raise RequestError(f"there are no weights of Inception at {given}")
        return Path(given)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    return path if path.is_file() else None


class Inception:
    """The 2048 features of the Inception network that FID is defined on (Heusel et al. 2017), as torch-fidelity has it.

    Raises MissingExtra without torch-fidelity.
    """

    name = "inception"
    identity = "Inception of 2015-12-05, pool of 2048, as in torch-fidelity"
    resize = "299x299, bilinear as in TensorFlow 1, not antialiased"

    def __init__(self, weights: Path, device: torch.device):
        module = optional("torch_fidelity.feature_extractor_inceptionv3", "eval")
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        self.network, self.device = network.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        def features(picture: Image.Image) -> np.ndarray:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]  # uint8 (1, 3, h, w)
            return self.network(pixels.to(self.device))[0].cpu().numpy()

        return np.concatenate([features(picture) for picture in pictures])
