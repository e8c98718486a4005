"""Depth maps of 16 bits: what is decoded becomes what diffusers makes of it, and a PNG keeps all of it."""

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessorLDM3D
from PIL import Image

from ldm.errors import NumericalError
from ldm.image.depth import depth_path, to_depth
from ldm.image.io import Numbered, write_png

NUMBERS = np.random.default_rng(0)


def test_green_is_the_high_byte_and_blue_the_low_one():
    bytes_ = np.array([[[255, 18, 52], [0, 255, 255]]])
    assert np.asarray(to_depth(bytes_ / 127.5 - 1)).tolist() == [[0x1234, 0xFFFF]]


def test_a_single_channel_is_the_depth_itself():
    assert np.asarray(to_depth(np.array([[[-1.0], [0.0], [1.0], [3.0]]]))).tolist() == [[0, 32767, 65535, 65535]]


def test_the_depth_of_decoded_channels_is_that_of_diffusers():
    channels = NUMBERS.normal(size=(16, 24, 6)).astype(np.float32)
    levels = np.clip(channels / 2 + 0.5, 0, 1)
    # Integers of 32 bits, since its latest release gives the map in the type that it was given.
    colour = (levels[..., 3:] * 255).round().astype(np.int32)
    np.testing.assert_array_equal(to_depth(channels[..., 3:]), VaeImageProcessorLDM3D.rgblike_to_depthmap(colour))
    np.testing.assert_array_equal(to_depth(channels[..., 3:4]), (levels[..., 3] * 65535).astype(np.uint16))


def test_every_depth_survives_the_png(tmp_path):
    depth = np.arange(2**16).reshape(256, 256).astype(np.uint16)
    path = write_png(tmp_path / "depth.png", Image.fromarray(depth))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), depth)
    # What is read back is what diffusers' own upscaler of such pairs reads.
    read = VaeImageProcessorLDM3D.depth_pil_to_numpy(Image.open(path))
    np.testing.assert_allclose(read[0], depth / 65535, atol=1e-7)


def test_a_depth_that_is_not_finite_is_an_error_and_other_channels_are_refused():
    with pytest.raises(NumericalError, match="depth"):
        to_depth(np.full((2, 2, 3), np.nan))
    with pytest.raises(ValueError, match="got \\(2, 2, 2\\)"):
        to_depth(np.zeros((2, 2, 2)))


def pair(grey: int) -> tuple[Image.Image, Image.Image]:
    return Image.new("RGB", (8, 8), (grey, 0, 0)), Image.fromarray(np.full((8, 8), 256 * grey, np.uint16))


def test_picture_and_depth_have_one_number_and_neither_is_written_over(tmp_path):
    numbered = Numbered(tmp_path)
    write_png(tmp_path / "00000_depth.png", pair(9)[1])
    image, depth = pair(1)
    assert numbered.save(image, depth=depth).name == "00001.png"
    assert numbered.save_as(0, 2, *pair(2)[:1], depth=pair(2)[1]).name == "00002.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000_depth.png", "00001.png", "00001_depth.png", "00002.png", "00002_depth.png"]
    assert Image.open(depth_path(tmp_path / "00001.png")).getpixel((0, 0)) == 256


def test_a_pair_that_is_there_already_is_completed_under_its_number(tmp_path):
    image, depth = pair(3)
    write_png(tmp_path / "00004.png", image)
    assert Numbered(tmp_path).save_as(4, 9, image, depth=depth).name == "00004.png"
    assert Numbered(tmp_path).save_as(4, 9, image, depth=depth).name == "00004.png"
    assert len(list(tmp_path.iterdir())) == 2
