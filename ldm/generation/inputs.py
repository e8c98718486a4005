"""The pictures that a request starts from, made to fit the model."""

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import RequestError
from ldm.generation.geometry import Geometry
from ldm.generation.request import Request
from ldm.image.io import fill_up, fit, read_depth, read_image, read_mask, read_shares, to_array

logger = logging.getLogger(__name__)

UPSCALES = "this model enlarges a picture: use scripts/upscale.py with --init-img"


class Given(NamedTuple):
    """What a batch starts from, on its device; None where it does not.

    image: (1, 3, h, w) in [-1, 1]; mask: (1, 1, h, w), 1 where it is repainted; depth: (1, 1, *, *), larger is nearer;
    latent: (b, c, h, w), what another model has drawn; size: the width and height in pixels that are drawn.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    depth: Tensor | None = None
    latent: Tensor | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Inputs:
    """The picture to start from and the mask of what is repainted (white), of the size in pixels that is drawn.

    depth: a map (*, *) of its depth, of any size. A picture that is told as a whole is of its own size, too. For a
    model that enlarges pictures, `image` is the small one, filled up at its right and lower edges, and `cut` the size
    that is left of what is drawn.
    """

    width: int
    height: int
    image: Image.Image | None = None
    mask: Image.Image | None = None
    depth: np.ndarray | None = None
    cut: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def tensors(self, device: torch.device) -> Given:
        image = mask = depth = None
        if self.image is not None:
            image = torch.from_numpy(to_array(self.image)).permute(2, 0, 1)[None].to(device)
        if self.mask is not None:
            mask = torch.from_numpy(np.array(self.mask, dtype=np.float32) / 255)[None, None].to(device)
        if self.depth is not None:
            depth = torch.from_numpy(self.depth)[None, None].to(device)
        return Given(image, mask, depth, size=self.size)

    def restore(self, drawn: Image.Image) -> Image.Image:
        """Cut off what was filled up, and put back every pixel that was not to be repainted, unchanged."""
        if self.cut and self.cut != drawn.size:
            return drawn.crop((0, 0, *self.cut))
        return drawn if self.mask is None else Image.composite(drawn, self.image, self.mask)


def read_inputs(request: Request, geometry: Geometry) -> Inputs:
    """Read what a request starts from, at the size that is drawn. Raises ImageError, RequestError."""
    if request.init_img is None:
        if geometry.enlarges > 1:
            raise RequestError(UPSCALES)
        return Inputs(*geometry.size(request))
    if request.varies:
        return Inputs(*geometry.size(request), _read_whole(request.init_img, fingerprint(request.init_img)))
    if geometry.image_channels != 3 and geometry.enlarges > 1:
        files = tuple(path and fingerprint(path) for path in (request.init_img, request.depth_img))
        return _read_pair(request.init_img, request.depth_img, geometry, files)
    if geometry.image_channels != 3:
        raise RequestError("this model draws a picture and its depth, from a prompt alone: use scripts/txt2img.py")
    paths = request.init_img, request.mask, request.depth_img
    files = tuple(path and fingerprint(path) for path in paths)
    return _read_inputs(*paths, request.width, request.height, geometry, files)


def fingerprint(path: str) -> tuple | None:
    """What changes when a file does; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _read_whole(path: str, file: tuple | None) -> Image.Image:
    """As it is, once for as long as `file` tells that it is the same."""
    return read_image(path)


@lru_cache(maxsize=4)
def _read_pair(init_img: str, depth_img: str, geometry: Geometry, files: tuple) -> Inputs:
    """A picture and its depth at the size to which they are enlarged, in multiples of what can be drawn."""
    image, depth = read_image(init_img), read_shares(depth_img)
    if image.size != depth.size:
        raise RequestError(f"the depth map {depth_img} must have the size of {init_img}, {image.width}x{image.height}; "
                           f"it is {depth.width}x{depth.height}")
    large = image.resize([geometry.enlarges * side for side in image.size], Image.Resampling.LANCZOS)
    fitted = fit(large, geometry.step)
    if fitted.changed:
        logger.warning("%s is drawn at %dx%d", init_img, *fitted.image.size)
    shares = np.asarray(depth.resize(fitted.image.size, Image.Resampling.LANCZOS)).clip(0, 1)
    return Inputs(*fitted.image.size, image.resize(fitted.image.size, Image.Resampling.LANCZOS), depth=2 * shares - 1)


@lru_cache(maxsize=4)
def _read_inputs(
    init_img: str,
    mask: str | None,
    depth_img: str | None,
    width: int | None,
    height: int | None,
    geometry: Geometry,
    files: tuple,
) -> Inputs:
    """Each file is read, and what is done to it told, once for as long as `files` tell that it is the same."""
    image = read_image(init_img)
    own = image.size
    if geometry.enlarges > 1:
        small = fill_up(image, geometry.step // geometry.enlarges)
        (width, height), (w, h) = ([side * geometry.enlarges for side in one.size] for one in (small, image))
        return Inputs(width, height, small, cut=(w, h))
    if width or height:
        size = geometry.size(Request(width=width or own[0], height=height or own[1]))
        image = image.resize(size, Image.Resampling.LANCZOS)
    image = fit(image, geometry.step).image
    if image.size != own:
        logger.warning("%s is resized from %dx%d to %dx%d", init_img, *own, *image.size)
    depth = read_depth(depth_img) if depth_img else None
    if depth is not None and abs(depth.shape[1] / depth.shape[0] * own[1] / own[0] - 1) > 0.02:
        logger.warning("the depth map %s is not of the shape of %s: it is stretched to it", depth_img, init_img)
    if mask is None:
        return Inputs(*image.size, image, depth=depth)
    fitted = read_mask(mask, own)
    if fitted.changed:
        logger.warning("the mask %s is not of the size of %s: it is resized to it", mask, init_img)
    return Inputs(*image.size, image, read_mask(mask, image.size).image, depth)
