"""scripts/depth2img.py, run as a user does."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.io import read_image
from ldm.image.metadata import read_record


@pytest.fixture
def depth2img(script, models, photo):
    """Two steps on the tiny depth model."""
    return lambda *options, kind="depth", **_: script(
        "depth2img", "--ckpt", models[kind], "--steps", 2, "--safety", "off", "--watermark", "off", "--skip_grid",
        *options)  # fmt: skip


@pytest.fixture
def depth(tmp_path):
    """A map of 16 bits that grows to the right."""
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)).save(tmp_path / "depth.png")
    return tmp_path / "depth.png"


def pixels(path) -> np.ndarray:
    return np.array(read_image(path))


def test_the_depth_decides_even_where_the_picture_itself_is_forgotten(depth2img, photo, depth):
    Image.open(depth).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("other.png")
    options = ("--init-img", photo, "--strength", 1, "--depth-img")
    one, two = (depth2img(*options, path) for path in (depth, "other.png"))
    assert (one.code, one.out) == (0, ["outputs/depth2img-samples/samples/00000.png"])
    assert not np.array_equal(pixels(one.out[0]), pixels(two.out[0]))


def test_a_map_of_more_bits_and_another_size_is_the_same_depth(depth2img, photo, depth):
    row = np.linspace(0, 255, 128)[None].repeat(128, 0)
    Image.fromarray(row.astype(np.float32)).save("depth.tiff")
    one, two = (depth2img("--init-img", photo, "--depth-img", path) for path in (depth, "depth.tiff"))
    difference = np.abs(pixels(one.out[0]).astype(int) - pixels(two.out[0]))
    assert difference.mean() < 1


def test_a_row_may_have_a_map_of_its_own_which_its_replay_takes_again(depth2img, photo, depth):
    Path("rows.txt").write_text(f"a fox --depth-img {depth}\na hare --seed 7\n", encoding="utf-8")
    first = depth2img("--from-file", "rows.txt", "--init-img", photo, "--sampler", "plms")
    assert (first.code, len(first.out), first.err) == (0, 2, [])
    again = depth2img("--replay", first.out[0], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[0]).read_bytes()
    assert read_record(first.out[0])["request"]["depth_img"] == str(depth)


def test_a_map_of_another_shape_is_stretched_with_a_notice(depth2img, photo):
    Image.new("L", (20, 10), 128).save("wide.png")
    done = depth2img("--init-img", photo, "--depth-img", "wide.png")
    assert done.code == 0
    assert done.said == f"the depth map wide.png is not of the shape of {photo}: it is stretched to it"


@pytest.mark.parametrize(("options", "code", "said"), [
    ([], 2, "--init-img FILE"),
    (["--init-img", "photo.png", "--depth-img", "none.png"], 2, "there is no picture at none.png"),
    (["--depth-img", "depth.png", "--from-file", "rows.txt"], 2, "a depth map needs the picture"),
    (["--init-img", "photo.png", "--depth-img", "nan.tiff"], 2, "not finite"),
])  # fmt: skip
def test_a_mistake_is_told_in_one_line(depth2img, depth, options, code, said):
    Path("rows.txt").write_text("a fox\n", encoding="utf-8")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save("nan.tiff")
    done = depth2img(*options)
    assert done.code == code
    assert said in done.said


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(depth2img, photo):
    done = depth2img("--init-img", photo, kind="text")
    assert done.code == 2
    assert "LatentDiffusion" in done.said
    assert "scripts/txt2img.py" in done.said


@pytest.mark.parametrize("name", ["txt2img", "img2img", "inpaint"])
def test_another_script_names_this_one(script, models, photo, mask, name):
    options = {"txt2img": [], "img2img": ["--init-img", photo], "inpaint": ["--init-img", photo, "--mask", mask]}
    done = script(name, "--ckpt", models["depth"], "--steps", 2, *options[name])
    if name == "img2img":  # the same request
        assert done.code == 0
    else:
        assert done.code == 2
        assert "use scripts/depth2img.py with --init-img" in done.said

