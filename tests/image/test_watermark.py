"""ldm.image.watermark: a mark is there for whoever reads it, or the picture is as it was and says so."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.errors import MissingExtra
from ldm.image.io import read_image, write_png
from ldm.image.watermark import METHODS, TEXT, Found, load_package, read_watermark, stamp


def flat(colour, size=(256, 256)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(size=(256, 256), spread=8) -> Image.Image:
    rng = np.random.default_rng(0)
    pixels = 128 + spread * rng.standard_normal((size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def slope(size=(256, 256)) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([across, down, 1 - across], -1)).astype(np.uint8))


def lettering(size=(256, 256)) -> Image.Image:
    image = flat((10, 10, 60), size)
    draw = ImageDraw.Draw(image)
    for top in range(0, size[1], 24):
        draw.text((0, top), "in letters of gold " * 4, fill=(200, 30, 30))
    return image


KEEP_THE_ORIGINALS = {"black": flat("black"), "grey": flat("grey"), "noise": noise(), "letters": lettering()}
KEEP_THE_FALLBACK = {"sky": flat((120, 170, 220)), "skin": flat((224, 172, 140)), "slope": slope(),
                     "wide": slope((512, 256)), "odd": slope((515, 387))}
KEEP_NONE = {"white": flat("white"), "blue": flat("blue"), "loud": noise(spread=200)}


@pytest.mark.parametrize("image, method", [
    *((image, "dwtDct") for image in KEEP_THE_ORIGINALS.values()),
    *((image, "dwtDctSvd") for image in KEEP_THE_FALLBACK.values()),
], ids=[*KEEP_THE_ORIGINALS, *KEEP_THE_FALLBACK])
def test_a_mark_is_read_back_from_the_saved_picture(tmp_path, image, method):
    stamped = stamp(image)
    assert stamped.method == method
    assert stamped.note == ""
    assert stamped.image.size == image.size
    saved = read_image(write_png(tmp_path / "marked.png", stamped.image))
    assert read_watermark(saved) == Found("StableDiffusionV1", method)
    assert read_watermark(image) is None


@pytest.mark.parametrize("image", KEEP_NONE.values(), ids=KEEP_NONE)
def test_a_picture_that_keeps_no_mark_stays_as_it_was_and_says_so(image):
    before = image.tobytes()
    marked, method, note = stamp(image)
    assert marked.tobytes() == image.tobytes() == before
    assert method is None
    assert all(name in note for name in METHODS)
    assert read_watermark(marked) is None


@pytest.mark.parametrize("size", [(1, 1), (255, 256), (64, 1023)])
def test_a_small_picture_stays_as_it_was_and_says_so(size):
    image = noise(size)
    marked, method, note = stamp(image)
    assert marked.tobytes() == image.tobytes()
    assert method is None
    assert "under 256x256" in note
    assert read_watermark(image) is None


@pytest.mark.parametrize("size, text", [((256, 256), "x" * 129), ((65536, 4), TEXT), ((256, 256), "")])
def test_a_text_that_does_not_fit_leaves_the_picture_as_it_was(size, text):
    image = noise(size)
    marked, method, note = stamp(image, text)
    assert marked.tobytes() == image.tobytes()
    assert method is None
    assert "does not go into" in note
    assert read_watermark(image, text) is None


@pytest.mark.parametrize("text", ["SDV2", "größer ☃", "x" * 40, "0xno bytes"])
def test_another_text_is_found_by_whoever_looks_for_it(text):
    marked, method, _ = stamp(noise((512, 512), 2), text)
    assert method in METHODS
    assert read_watermark(marked, text) == Found(text, method)
    assert read_watermark(marked, text[:-1] + "?") is None
    assert read_watermark(marked) is None


def test_a_mark_in_hexadecimal_is_written_as_the_bits_that_it_names():
    marked, method, _ = stamp(noise((512, 512), 2), "0xb3ec907bb19e")
    bits = load_package().WatermarkDecoder("bits", 48).decode(np.asarray(marked)[..., ::-1], method)
    assert "".join(str(int(bit)) for bit in bits) == "101100111110110010010000011110111011000110011110"


def test_stamping_leaves_the_given_picture_alone_and_repeats_itself():
    image = noise()
    before = image.tobytes()
    first, second = stamp(image).image, stamp(image).image
    assert image.tobytes() == before
    assert first.tobytes() == second.tobytes() != before


def test_the_mark_is_the_originals_to_the_bit():
    # What the package makes of this picture, as the original script calls it.
    import cv2
    from imwatermark import WatermarkEncoder
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", b"StableDiffusionV1")
    image = lettering()
    wanted = encoder.encode(cv2.cvtColor(np.array(image), cv2.COLOR_RGB2BGR), "dwtDct")[:, :, ::-1]
    assert np.array_equal(stamp(image).image, wanted)


def test_most_pictures_keep_a_mark():
    every = [*KEEP_THE_ORIGINALS.values(), *KEEP_THE_FALLBACK.values(), *KEEP_NONE.values()]
    kept = [stamp(image).method for image in every]
    assert (kept.count("dwtDct"), kept.count("dwtDctSvd"), kept.count(None)) == (4, 5, 3)


def test_loading_the_package_raises_no_warning_and_changes_no_setting_of_pillow(tmp_path):
    path = write_png(tmp_path / "a.png", noise())
    code = (
        "import sys; from PIL import Image, ImageFile, PngImagePlugin; "
        "state = lambda: (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK); "
        "before = state(); from ldm.image.watermark import stamp; "
        "image = Image.open(sys.argv[1]); print(stamp(image).method, state() == before)"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("dwtDct True\n", "")


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    for use in (stamp, read_watermark):
        with pytest.raises(MissingExtra, match="pip install invisible-watermark") as caught:
            use(noise())
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
