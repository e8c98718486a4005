"""ldm.image.io: pictures of every kind come in as RGB, and damaged ones as one clear line."""

import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm.errors import ImageError, NumericalError
from ldm.image.io import fit, from_array, read_image, read_mask, to_array, to_image

RED = (255, 0, 0)


def colours(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def saved(tmp_path, image: Image.Image, name: str = "picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel(path) -> tuple[int, int, int]:
    image = read_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_rgb_comes_back_as_it_was(tmp_path):
    image = colours(7, 5)
    assert np.array_equal(read_image(saved(tmp_path, image)), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # The corner that a viewer shows at the top left, and whether the sides swap (Exif 2.32, tag 0x0112).
    corner, swapped = {1: ("00", 0), 2: ("10", 0), 3: ("11", 0), 4: ("01", 0),
                       5: ("00", 1), 6: ("01", 1), 7: ("11", 1), 8: ("10", 1)}[orientation]
    image = Image.new("RGB", (4, 2))
    image.putpixel((3 * int(corner[0]), int(corner[1])), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read_image(saved(tmp_path, image, exif=exif))
    assert upright.size == ((2, 4) if swapped else (4, 2))
    assert upright.getpixel((0, 0)) == RED
    assert np.asarray(upright).sum() == 255
    assert not upright.info


def test_damaged_exif_does_not_hide_the_pixels(tmp_path, caplog):
    path = saved(tmp_path, Image.new("RGB", (3, 2), RED), exif=b"Exif\0\0XXXX not a TIFF header")
    assert pixel(path) == RED
    assert "EXIF" in caplog.text


@pytest.mark.parametrize("alpha, wanted", [(0, (255, 255, 255)), (255, RED), (102, (255, 153, 153))])
def test_rgba_is_composited_on_white(tmp_path, alpha, wanted):
    assert pixel(saved(tmp_path, Image.new("RGBA", (2, 2), (*RED, alpha)))) == wanted


def test_grey_with_alpha_is_composited_on_white(tmp_path):
    assert pixel(saved(tmp_path, Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    assert pixel(saved(tmp_path, Image.new("LA", (2, 2), (40, 255)))) == (40, 40, 40)


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("P", b"\0"), ("RGB", (1, 2, 3)), ("L", 0), ("1", 0)])
def test_a_transparent_colour_is_composited_on_white(tmp_path, mode, transparent):
    image = Image.new(mode, (2, 2), (1, 2, 3) if mode == "RGB" else 0)
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
    assert pixel(saved(tmp_path, image, transparency=transparent)) == (255, 255, 255)


def test_an_animated_picture_gives_its_first_frame(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4), RED), "picture.gif", save_all=True,
                 append_images=[Image.new("RGB", (4, 4), (0, 0, 255))])
    assert pixel(path) == RED


@pytest.mark.parametrize("mode, colour, wanted", [
    ("1", 1, (255, 255, 255)), ("L", 77, (77, 77, 77)), ("P", 1, (9, 8, 7)), ("CMYK", (0, 255, 255, 0), RED),
    ("YCbCr", (128, 128, 128), (128, 128, 128)), ("LAB", (255, 128, 128), (255, 255, 255)),
])
def test_every_mode_becomes_rgb(tmp_path, mode, colour, wanted):
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([1, 2, 3, 9, 8, 7])
    assert np.abs(np.subtract(pixel(saved(tmp_path, image, "picture.tif")), wanted)).max() <= 1


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "picture.jpg", quality=100)
    assert np.abs(np.subtract(pixel(path), RED)).max() <= 2


@pytest.mark.parametrize("name", ["picture.png", "picture.tif", "picture.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    levels = np.array([[0, 257 * 100, 257 * 200 + 100, 65535]], np.uint16)
    image = read_image(saved(tmp_path, Image.fromarray(levels), name))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 200, 255]


@pytest.mark.parametrize("levels, wanted", [
    (np.array([[-5, 0, 25700, 65535]], np.int32), [0, 0, 100, 255]),
    (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
    (np.array([[0, 0.4, 1]], np.float32), [0, 102, 255]),
    (np.array([[-1, 0, 40, 255]], np.float32), [0, 0, 40, 255]),
    (np.array([[0, 1e9]], np.float32), [0, 255]),
    (np.zeros((1, 2), np.float32), [0, 0]),
])
def test_integers_and_floats_are_scaled_by_the_white_that_holds_them(tmp_path, levels, wanted):
    path = saved(tmp_path, Image.fromarray(levels), "picture.tif")
    assert np.asarray(read_image(path))[0, :, 1].tolist() == wanted


def test_a_float_picture_with_nan_is_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, np.nan]], np.float32)), "picture.tif")
    with pytest.raises(ImageError, match="not finite"):
        read_image(path)


def bad_files(tmp_path):
    whole = saved(tmp_path, colours(64, 64), "whole.png").read_bytes()
    jpeg = saved(tmp_path, colours(64, 64), "whole.jpg").read_bytes()
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "page.png").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "truncated.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (tmp_path / "header.png").write_bytes(whole[:20])
    (tmp_path / "crc.png").write_bytes(whole[:60] + bytes(40) + whole[100:])
    (tmp_path / "folder.png").mkdir()
    return ["zero.png", "page.png", "truncated.png", "truncated.jpg", "header.png", "crc.png", "folder.png",
            "absent.png", "a" * 300 + ".png", "nul\0.png"]


def test_an_unusable_file_is_one_clear_line_with_its_name(tmp_path):
    for name in bad_files(tmp_path):
        for read in (read_image, lambda path: read_mask(path, (8, 8))):
            with pytest.raises(ImageError) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
            assert caught.value.exit_code == 2


@pytest.mark.parametrize("excess", [1.5, 4])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, excess):
    path = saved(tmp_path, Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10000 / excess))
    with pytest.raises(ImageError, match="megapixels"):
        read_image(path)


def test_a_bomb_in_the_metadata_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(ImageError, match="too large"):
        read_image(saved(tmp_path, colours(4, 4), pnginfo=info))


def test_a_special_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a picture file"):
        read_image(tmp_path / "pipe.png")


def test_odd_metadata_raises_no_warning(tmp_path):
    # An animation that claims to have no frames makes Pillow warn.
    whole = saved(tmp_path, Image.new("RGB", (2, 2), RED)).read_bytes()
    chunk = b"acTL" + bytes(8)
    path = tmp_path / "odd.png"
    path.write_bytes(whole[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(path) as image:
            image.load()
    assert seen, "this file is meant to make Pillow warn"
    assert pixel(path) == RED


@pytest.mark.parametrize("size, wanted", [
    ((512, 512), (512, 512)), ((513, 575), (512, 512)), ((63, 640), (64, 640)), ((1, 1), (64, 64)),
    ((1000, 1), (960, 64)),
])
def test_fit_rounds_each_side_down_to_a_multiple_of_64(size, wanted):
    image, changed = fit(Image.new("RGB", size, RED))
    assert image.size == wanted
    assert changed == (size != wanted)
    assert image.getpixel((0, 0)) == RED


def test_fit_takes_the_multiple_from_the_caller_and_resizes_with_lanczos():
    image = colours(70, 50)
    fitted, changed = fit(image, 8)
    assert changed
    assert np.array_equal(fitted, image.resize((64, 48), Image.Resampling.LANCZOS))


def test_mask_is_black_or_white_with_half_grey_upward_white(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)))
    mask, changed = read_mask(path, (4, 1))
    assert mask.mode == "L"
    assert not changed
    assert np.asarray(mask).tolist() == [[0, 0, 255, 255]]


@pytest.mark.parametrize("mode, black, white", [
    ("1", 0, 1), ("RGB", (0, 0, 0), (255, 255, 255)), ("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
    ("LA", (0, 255), (255, 255)), ("I;16", 257 * 127, 257 * 128), ("F", 0.0, 1.0), ("CMYK", (0, 0, 0, 255), (0,) * 4),
])
def test_mask_may_have_any_mode(tmp_path, mode, black, white):
    image = Image.new(mode, (2, 1), black)
    image.putpixel((1, 0), white)
    mask, _ = read_mask(saved(tmp_path, image, "mask.tif"), (2, 1))
    assert np.asarray(mask).tolist() == [[0, 255]]


def test_mask_of_another_size_is_resized_by_majority_and_says_so(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, :5] = 255  # of the second 4x4 block, one column in four is white
    mask, changed = read_mask(saved(tmp_path, Image.fromarray(pixels)), (2, 2))
    assert changed
    assert np.asarray(mask).tolist() == [[255, 0], [0, 0]]
    larger, changed = read_mask(saved(tmp_path, mask), (6, 4))
    assert changed
    assert np.array_equal(larger, np.kron(mask, np.ones((2, 3), np.uint8)))


def test_every_level_survives_to_array_and_back():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    pixels = to_array(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == (16, 16, 3)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(from_array(pixels), image)
    assert np.array_equal(from_array(np.asarray(image)), image)


def test_decoded_pixels_are_rounded_as_the_original_does():
    torch = pytest.importorskip("torch")
    decoded = torch.from_numpy(np.random.default_rng(1).uniform(-1.3, 1.3, (64, 64, 3)).astype(np.float32))
    unit = torch.clamp((decoded + 1.0) / 2.0, min=0.0, max=1.0)
    assert np.array_equal(to_image(decoded.numpy()), (255.0 * unit.numpy()).astype(np.uint8))


def test_decoded_pixels_are_rounded_down():
    pixels = np.array([-2, -1, -1 + 1.99 / 127.5, 0, 0.999, 1, 7]).reshape(1, 7, 1).repeat(3, 2)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 1, 127, 254, 255, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("convert", [to_image, from_array])
def test_pixels_that_are_not_finite_never_become_a_picture(convert, bad):
    pixels = np.zeros((4, 4, 3), np.float32)
    pixels[1, 2, 0] = bad
    with pytest.raises(NumericalError, match="1 of 48"):
        convert(pixels)


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (1, 4, 4, 3)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        to_image(np.zeros(shape, np.float32))


@pytest.mark.parametrize("module", ["ldm.image", "ldm.image.io", "ldm.image.grid", "ldm.image.watermark",
                                    "ldm.image.metadata"])
def test_importing_stays_light(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'cv2', 'imwatermark', 'pywt'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
