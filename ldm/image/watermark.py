"""The original's invisible watermark: written, then read back, so that nobody believes in a mark that is not there."""

import importlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.errors import MissingExtra

TEXT = "StableDiffusionV1"
# The original writes dwtDct, which many smooth pictures do not keep; dwtDctSvd holds in most of those.
METHODS = ("dwtDct", "dwtDctSvd")
MIN_PIXELS = 256 * 256  # the package refuses less
BLOCK = 8  # a bit goes into 4x4 coefficients of the half-size wavelet band: 8x8 pixels


class Stamped(NamedTuple):
    """A picture, the method its mark can be read back with, or None and a note that says why there is no mark."""

    image: Image.Image
    method: str | None
    note: str = ""


class Found(NamedTuple):
    """A watermark that was read from a picture, and the method that it was written with."""

    text: str
    method: str


def stamp(image: Image.Image, text: str = TEXT) -> Stamped:
    """Write `text` invisibly into an RGB picture: by the first method that can be read back, else not at all.

    text: UTF-8, or bytes in hexadecimal after 0x, for marks that are no text.

    A picture that keeps no mark comes back as it was. Raises MissingExtra without the package invisible-watermark.
    """
    why_not = _obstacle(image, text)
    if why_not:
        return Stamped(image, None, f"no watermark: {why_not}")
    pixels = _to_bgr(image)
    for method in METHODS:
        marked = _encode(pixels, text, method)
        if _decode(marked, text, method):
            return Stamped(Image.fromarray(np.ascontiguousarray(marked[..., ::-1])), method)
    return Stamped(image, None, f"no watermark: this picture keeps neither {' nor '.join(METHODS)}")


def read_watermark(image: Image.Image, text: str = TEXT) -> Found | None:
    """Find `text`, whole, in a picture, whichever method wrote it. Raises MissingExtra as `stamp` does."""
    if _obstacle(image, text):
        return None
    pixels = _to_bgr(image)
    return next((Found(text, method) for method in METHODS if _decode(pixels, text, method)), None)


def _obstacle(image: Image.Image, text: str) -> str:
    """Why this picture has no room for this text; empty if it has."""
    width, height = image.size
    if width * height < MIN_PIXELS:
        return f"{width}x{height} is under 256x256 pixels"
    room = (width // BLOCK) * (height // BLOCK) // 8
    need = len(as_bytes(text))
    if not 0 < need <= room:
        return f"a text of {need} bytes does not go into {width}x{height} pixels, which hold 1 to {room}"
    return ""


def as_bytes(text: str) -> bytes:
    """What is written for a text: the bytes that it names after 0x, else itself in UTF-8."""
    if re.fullmatch("0x(?:[0-9a-f]{2})+", text):
        return bytes.fromhex(text[2:])
    return text.encode()


def _to_bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])


def _encode(pixels: np.ndarray, text: str, method: str) -> np.ndarray:
    encoder = load_package().WatermarkEncoder()
    encoder.set_watermark("bytes", as_bytes(text))
    with np.errstate(invalid="ignore"):  # a colour that the wavelet pushes out of range wraps, as in the original
        return encoder.encode(pixels, method)


def _decode(pixels: np.ndarray, text: str, method: str) -> bool:
    wanted = as_bytes(text)
    return load_package().WatermarkDecoder("bytes", 8 * len(wanted)).decode(pixels, method) == wanted


def load_package():
    """Import the encoder, or say how to get it. Raises MissingExtra."""
    try:
        return importlib.import_module("imwatermark")
    except ImportError as error:  # not installed, or its OpenCV lacks a system library
        raise MissingExtra(
            f"the invisible watermark needs the package invisible-watermark ({error}); run: pip install "
            "invisible-watermark, and on a machine without a display opencv-python-headless in place of opencv-python; "
            "or use --watermark off"
        ) from error
