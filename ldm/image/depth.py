"""Depth maps of 16 bits, from what autoencoders of pictures with depth decode."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import NumericalError

WHITE = 2**16 - 1


def to_depth(channels: np.ndarray) -> Image.Image:
    """The depth map, mode I;16, of decoded channels in [-1, 1] (Stan et al. 2023, section 3).

    channels: (h, w, 3), a colour whose green is the high byte of the depth and whose blue is the low one; or (h, w, 1),
    the depth itself. Raises NumericalError where a value is not finite.
    """
    if channels.ndim != 3 or channels.shape[2] not in (1, 3):
        raise ValueError(f"a depth map is decoded as (h, w, 1) or (h, w, 3), got {channels.shape}")
    if not np.isfinite(channels).all():
        raise NumericalError("the decoded depth is not finite; try --precision full")
    parts = np.clip((channels.astype(np.float32) + 1) / 2, 0, 1)
    if channels.shape[2] == 1:
        depth = np.floor(WHITE * parts[..., 0])
    else:
        high, low = np.rint(255 * parts[..., 1]), np.rint(255 * parts[..., 2])
        depth = 256 * high + low
    return Image.fromarray(depth.astype(np.uint16))


def depth_path(path: Path) -> Path:
    """Where the depth of a picture lies: NAME_depth.png beside NAME.png."""
    return path.with_stem(f"{path.stem}_depth")
