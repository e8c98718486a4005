"""Reading pictures of any kind as RGB, and the one place that writes a PNG: whole or not at all, never over another."""

import errno
import filecmp
import io
import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ldm.errors import ImageError, NumericalError, OutputError, RequestError
from ldm.image.depth import depth_path

logger = logging.getLogger(__name__)

# The values that stand for white in the modes of more than 8 bits, told apart by the brightest pixel: a 16-bit PNG may
# be opened as I, a float TIFF may count to 1, to 255 or to 65535.
WHITES = {"I": (2**16 - 1, 2**31 - 1), "F": (1.0, 255.0, 65535.0)}

# Names of files that are still being written. Nobody needs one that is a day old.
UNFINISHED = ".ldm-{}.tmp"
STALE_SECONDS = 24 * 3600


class Fitted(NamedTuple):
    """A picture, and whether its size had to change."""

    image: Image.Image
    changed: bool


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture with Pillow. Raises ImageError, one line, for whatever keeps the block from reading it."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ImageError(f"{path} is not a picture file" if path.exists() else f"there is no picture at {path}")
        if not path.stat().st_size:
            raise ImageError(f"the picture {path} is empty (0 bytes)")
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, which concerns nobody, and about pictures that may fill the memory.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise ImageError(f"the picture {path} has more than {limit}; scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path} is not a picture in a known format, or its header is damaged") from error
    except Exception as error:  # a damaged file raises whatever the decoder of its format stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot read the picture {path}: {reason}") from error


def read_image(path: str | Path) -> Image.Image:
    """Read a picture of any mode as upright 8-bit RGB, without its metadata.

    The EXIF orientation is applied; whatever is transparent is composited on white; 16-bit and float pictures are
    scaled down, not clipped. Raises ImageError where the file is missing, damaged, empty or too large.
    """
    with open_image(path) as image:
        return _flatten(image, "white").convert("RGB")


def read_mask(path: str | Path, size: tuple[int, int]) -> Fitted:
    """Read a picture of any mode as a mask (mode L) of `size` (w, h): 255 is repainted, 0 is kept.

    From half grey upward is white, as in the original; transparent counts as black. A mask of another size is resized
    by area, so each pixel goes with the majority. Raises ImageError as `read_image` does.
    """
    with open_image(path) as image:
        mask = _flatten(image, "black").convert("L")
    changed = mask.size != tuple(size)
    if changed:
        mask = mask.resize(size, Image.Resampling.BOX)
    return Fitted(mask.point(lambda value: 255 if value >= 128 else 0), changed)


def read_depth(path: str | Path) -> np.ndarray:
    """Read a depth map, grey of 8 bits or more, as float32 (h, w), larger where it is brighter.

    Raises ImageError as `read_image` does, and where a value is not finite.
    """
    with open_image(path) as image:
        image.load()
        image = _upright(image)
        depth = np.array(image if image.mode[0] in "IF" else image.convert("L"), dtype=np.float32)
    if not np.isfinite(depth).all():
        raise ImageError(f"the depth map {path} has places that are not finite (NaN or infinity)")
    return depth


def read_shares(path: str | Path) -> Image.Image:
    """Read a depth map as `to_depth` makes them, or of 8 bits, as the share of white (mode F, 0 to 1).

    Raises ImageError as `read_image` does, and for one of another kind.
    """
    with open_image(path) as image:
        image.load()
        if image.mode not in ("I;16", "I", "L"):
            raise ImageError(f"the depth map {path} must be grey, of 8 or 16 bits, got a picture of mode {image.mode}")
        white = 2**8 - 1 if image.mode == "L" else 2**16 - 1
        return Image.fromarray(np.array(image, dtype=np.float32) / white)


def fit(image: Image.Image, multiple: int = 64) -> Fitted:
    """Resize a picture (Lanczos) so that each side is a multiple, rounded down, of at least one multiple."""
    size = tuple(max(multiple, side - side % multiple) for side in image.size)
    if size == image.size:
        return Fitted(image, False)
    return Fitted(image.resize(size, Image.Resampling.LANCZOS), True)


def fill_up(image: Image.Image, multiple: int) -> Image.Image:
    """Repeat the last columns and rows of a picture until each side is a multiple."""
    missing = [-side % multiple for side in image.size]
    if not any(missing):
        return image
    return Image.fromarray(np.pad(np.asarray(image), ((0, missing[1]), (0, missing[0]), (0, 0)), mode="edge"))


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of a picture as float32 (h, w, 3) in [-1, 1]."""
    return 2.0 * (np.asarray(image.convert("RGB")).astype(np.float32) / 255.0) - 1.0


def from_array(pixels: np.ndarray) -> Image.Image:
    """The picture of pixels (h, w, 3), uint8 or float in [-1, 1] rounded to the nearest: the inverse of `to_array`.

    Raises NumericalError where a pixel is not finite.
    """
    return _quantize(pixels, np.rint)


def to_image(pixels: np.ndarray) -> Image.Image:
    """The picture of decoded pixels (h, w, 3), uint8 or float in [-1, 1] rounded down as the original's scripts do.

    Raises NumericalError where a pixel is not finite.
    """
    return _quantize(pixels, np.floor)


def check_outdir(path: str | Path) -> Path:
    """Make a folder and try to write into it, before any work is done. Raises RequestError where that fails."""
    path = Path(path)
    probe = _unfinished(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except FileNotFoundError as error:  # in /proc, say, and on a drive that has gone
        raise RequestError(f"nothing can be written to {path}: choose another folder with --outdir") from error
    except OSError as error:
        raise RequestError(_explain(path, error)) from error
    return path


def write_png(path: str | Path, image: Image.Image, info: PngImagePlugin.PngInfo | None = None,
              overwrite: bool = False) -> Path:
    """Write a PNG whole or not at all, over an existing file only if told to.

    Raises OutputError where the name is taken or the folder cannot be written to.
    """
    path = Path(path)
    with _finished(path.parent, image, info) as temporary:
        if overwrite:
            temporary.replace(path)
        else:
            try:
                _publish(temporary, path)
            except FileExistsError as error:
                raise OutputError(f"{path} is already there and was left as it is; choose another name") from error
    return path


class Numbered:
    """The numbered pictures of one folder, e.g. 00000.png, 00001.png: each new one goes on from the highest present.

    Any number of threads and processes may write to the same folder: a name that is taken is passed over. The folder
    must exist (`check_outdir`). `pattern` has one %0Nd. A `depth` map goes beside its picture (`depth_path`).
    """

    def __init__(self, folder: str | Path, pattern: str = "%05d.png"):
        self.folder = Path(folder)
        self.pattern = pattern
        self._next: int | None = None

    def save(
        self, image: Image.Image, info: PngImagePlugin.PngInfo | None = None, depth: Image.Image | None = None
    ) -> Path:
        """Write a picture under the next free number. Raises OutputError where the folder cannot be written to."""
        with _finished(self.folder, image, info) as temporary:
            if self._next is None:
                _clean(self.folder)
                self._next = self.highest() + 1
            number = self._next
            while True:
                path = self.folder / (self.pattern % number)
                number += 1
                if depth is not None and depth_path(path).exists():
                    continue
                with suppress(FileExistsError):
                    _publish(temporary, path)
                    self._next = number
                    break
        if depth is not None:
            write_png(depth_path(path), depth, info)
        return path

    def save_as(
        self,
        number: int,
        spare: int,
        image: Image.Image,
        info: PngImagePlugin.PngInfo | None = None,
        depth: Image.Image | None = None,
    ) -> Path:
        """Write a picture under this number, or, where another one has it, under the first free from `spare` on.

        A file that is there already, byte for byte, is taken for written. Raises OutputError.
        """
        beside = nullcontext() if depth is None else _finished(self.folder, depth, info)
        with _finished(self.folder, image, info) as temporary, beside as second:
            while True:
                path = self.folder / (self.pattern % number)
                if not (second and _is_another(second, depth_path(path))) and _claim(temporary, path):
                    if second and not _claim(second, depth_path(path)):
                        raise OutputError(f"{depth_path(path)} was written by another program in this very moment")
                    return path
                number = max(number + 1, spare, self.highest() + 1)

    def highest(self) -> int:
        """The highest number present, -1 where there is none."""
        before, width, after = re.fullmatch(r"(.*)%0(\d+)d(.*)", self.pattern).groups()
        # Up to nine digits: a longer number is a date or a hash, not one of ours.
        name = re.compile(rf"{re.escape(before)}(\d{{{width},9}}){re.escape(after)}")
        matches = map(name.fullmatch, os.listdir(self.folder))
        return max((int(match[1]) for match in matches if match), default=-1)


class Outdir:
    """The output folder of a run: samples/00000.png, 00001.png ... and grid-0000.png, as the original lays it out.

    samples: the folder of the pictures in it. Raises RequestError where it cannot be made or written to.
    """

    def __init__(self, path: str | Path, samples: str = "samples"):
        self.path = check_outdir(path)
        self.samples = Numbered(check_outdir(self.path / samples), "%05d.png")
        self.grids = Numbered(self.path, "grid-%04d.png")
        _clean(self.samples.folder)
        _clean(self.path)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """The picture upright, opaque, and at 8 bits a channel."""
    image.load()
    image = _upright(image)
    if image.mode.startswith("I;16"):
        return _eight_bits(image, (2**16 - 1,))
    if image.mode in WHITES:
        return _eight_bits(image, WHITES[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image.info.clear()  # so that no profile or place of an input ends up in an output
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF is no reason to refuse the pixels
        logger.warning("the orientation in the EXIF data cannot be read (%s): the picture is taken as it lies", error)
        return image


def _eight_bits(image: Image.Image, whites: tuple[float, ...]) -> Image.Image:
    """A grey picture of more than 8 bits as L, scaled so that the lowest fitting white becomes 255."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("it has pixels that are not finite")
    peak = pixels.max()
    white = next((white for white in whites if peak <= white), peak)
    return Image.fromarray(np.rint(pixels.clip(0, white) * (255.0 / white)).astype(np.uint8))


def _quantize(pixels: np.ndarray, round_off: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be (h, w, 3), got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return Image.fromarray(pixels)
    pixels = pixels.astype(np.float32)
    broken = np.count_nonzero(~np.isfinite(pixels))
    if broken:
        raise NumericalError(f"{broken} of {pixels.size} pixel values are not finite; try --precision full")
    levels = 255.0 * np.clip((pixels + 1.0) / 2.0, 0.0, 1.0)
    return Image.fromarray(round_off(levels).astype(np.uint8))


@contextmanager
def _finished(folder: Path, image: Image.Image, info: PngImagePlugin.PngInfo | None) -> Iterator[Path]:
    """The PNG, whole and on the disk, under a hidden name of its own, which is gone after the block."""
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    temporary = _unfinished(folder)
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(_explain(folder, error)) from error


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError, leaving all as it is, where the name is taken."""
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        raise
    except OSError:  # FAT, some network and cloud drives have no hard links: claim the name first, then rename
        claim = path.with_name(UNFINISHED.format(path.name))
        claim.touch(exist_ok=False)
        try:
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            temporary.rename(path)
        finally:
            claim.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> bool:
    """Give a finished file its name, or find the same there already; False where another file has the name."""
    try:
        _publish(temporary, path)
        return True
    except FileExistsError:
        return not _is_another(temporary, path)


def _is_another(temporary: Path, path: Path) -> bool:
    return path.exists() and not filecmp.cmp(temporary, path, shallow=False)


def _unfinished(folder: Path) -> Path:
    return folder / UNFINISHED.format(uuid.uuid4().hex)


def _clean(folder: Path) -> None:
    """Remove what killed runs left half-written, long enough ago that nobody can still be writing it."""
    for path in folder.glob(UNFINISHED.format("*")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _explain(folder: Path, error: OSError) -> str:
    """Why a folder cannot be written to, and what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left to write in {folder}: free some, or choose another folder with --outdir"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"not allowed to write in {folder} ({error.strerror}): choose another folder with --outdir"
        case errno.EEXIST | errno.ENOTDIR:
            return f"{folder} cannot be a folder, a file is in the way: choose another one with --outdir"
        case errno.ENOENT:
            return f"the folder {folder} has disappeared: it must stay in place until the run is over"
        case _:
            return f"cannot write in {folder}: {error.strerror or error}"
