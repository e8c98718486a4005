"""A glimpse of the pictures while they are sampled, through a linear map from latents to colours."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldm.errors import LdmError, NumericalError
from ldm.generation import stages
from ldm.generation.geometry import Geometry
from ldm.image.grid import grid
from ldm.image.io import to_image, write_png
from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

SIDE = 8  # of the latents that the map is fitted to
CELL = 2  # of their places, of one colour
SAMPLES = 4  # at least, for each unknown of the map


@torch.inference_mode()
def fit_colours(model: LatentDiffusion, geometry: Geometry) -> Tensor:
    """The least-squares map (c + 1, 3) from a place of a latent, and a constant, to the mean colour of its pixels.

    It is fitted to what this model's encoder makes of a few chequers of random colours, whatever channels its latents
    have: latents that are drawn at random are those of no picture, and mislead it. Raises NumericalError
    where the encoder makes nothing of them.
    """
    count = max(2, math.ceil(SAMPLES * (geometry.channels + 1) / SIDE**2))
    cells = torch.rand(count, 3, SIDE // CELL, SIDE // CELL, generator=torch.Generator().manual_seed(0)) * 2 - 1
    colours = functional.interpolate(cells, scale_factor=CELL)
    images = functional.interpolate(colours, scale_factor=geometry.factor)
    # Where depth is encoded too, it is that of the colours.
    images = images.repeat(1, 2, 1, 1)[:, :geometry.image_channels]
    latents = stages.first_latent(model, images.to(model.device)).float().cpu()
    if not torch.isfinite(latents).all():
        raise NumericalError("the encoded colours are not finite: the checkpoint's autoencoder may be damaged")
    known, wanted = places(latents).flatten(0, 2), colours.movedim(1, -1).flatten(0, 2)
    return torch.linalg.lstsq(known.double(), wanted.double()).solution.float()


def places(latents: Tensor) -> Tensor:
    """Each place of latents (b, c, h, w) as a row of its channels and a constant: (b, h, w, c + 1)."""
    return functional.pad(latents.movedim(1, -1), (0, 1), value=1.0)


class Preview:
    """Writes the clean latents of a batch, as they are guessed at a step, to one file; the next one takes its place."""

    def __init__(self, path: Path, every: int, fit: Callable[[], Tensor], factor: int):
        """every: steps from one preview to the next; fit: gives the colour map; factor: pixels to a place."""
        self.path = path
        self.every = every
        self.factor = factor
        self._works = True
        self._colours = self._try(fit)

    def __call__(self, step: int, latents: Tensor) -> None:
        """Show the latents (b, c, h, w) of this step, counted from 1, if it is its turn."""
        if self._works and step % self.every == 0:
            self._try(lambda: write_png(self.path, self.draw(latents), overwrite=True))

    def draw(self, latents: Tensor) -> Image.Image:
        """The latents (b, c, h, w) as pictures of full size beside each other."""
        # In float64, which --precision autocast leaves alone.
        colours = (places(latents.cpu().double()).nan_to_num() @ self._colours.double()).float()
        images = [to_image(one.numpy()) for one in colours]
        return grid([image.resize([self.factor * side for side in image.size], Image.Resampling.BICUBIC)
                     for image in images], math.ceil(len(images) ** 0.5))

    def _try(self, work: Callable):
        """A preview that cannot be made costs no picture: it is told once, and there are no more."""
        try:
            return work()
        except LdmError as error:
            logger.warning("no preview: %s", error)
            self._works = False
