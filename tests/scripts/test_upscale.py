"""scripts/upscale.py, run as a user does."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.io import read_image
from ldm.image.metadata import read_record


@pytest.fixture
def upscale(script, models):
    """Two steps on a tiny upscaler."""
    return lambda *options, kind="x4": script(
        "upscale", "--ckpt", models[kind], "--steps", 2, "--safety", "off", "--watermark", "off", "--skip_grid",
        *options)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A picture of 18x13 pixels, which no UNet halves evenly."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    return tmp_path / "small.png"


def test_a_picture_of_any_size_becomes_four_times_as_large(upscale, small):
    done = upscale("--init-img", small)
    assert (done.code, done.out, done.err) == (0, ["outputs/upscale-samples/samples/00000.png"], [])
    assert read_image(done.out[0]).size == (72, 52)


def test_a_picture_of_any_size_becomes_twice_as_large(upscale, small):
    options = ("--init-img", small, "--scale_factor", 2)
    done = upscale(*options, kind="x2")
    assert (done.code, done.err) == (0, [])
    assert read_image(done.out[0]).size == (36, 26)
    told = upscale(*options, "--prompt", "(a cat:1.4), " * 30, "--prompt_weights", "--long_prompt", "chunk", kind="x2")
    assert not np.array_equal(read_image(told.out[0]), read_image(done.out[0]))


@pytest.mark.parametrize(("kind", "factor"), [("x4", 2), ("x2", 4)])
def test_a_model_that_enlarges_by_another_factor_says_by_which(upscale, small, kind, factor):
    done = upscale("--init-img", small, "--scale_factor", factor, kind=kind)
    assert done.code == 2
    assert f"--scale_factor {6 - factor}" in done.said


def test_each_option_changes_the_picture(upscale, small):
    options = [], ["--prompt", "a cat"], ["--noise_level", 200], ["--tile", 16]
    drawn = [read_image(upscale("--init-img", small, *one).out[0]).tobytes() for one in options]
    assert len(set(drawn)) == len(options)


@pytest.mark.parametrize(("options", "code", "said"), [
    ([], 2, "--init-img FILE"),
    (["--init-img", "none.png"], 2, "there is no picture at none.png"),
    (["--init-img", "small.png", "--noise_level", "351"], 2, "noise_level must be from 0 to 350, got 351"),
    (["--init-img", "small.png", "--tile", "3"], 2, "tile must be from 16"),
    (["--init-img", "small.png", "--scale_factor", "3"], 2, "invalid choice: 3"),
])  # fmt: skip
def test_a_mistake_is_told_in_one_line(upscale, small, options, code, said):
    done = upscale(*options)
    assert done.code == code
    assert said in done.said


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(upscale, small):
    done = upscale("--init-img", small, kind="text")
    assert done.code == 2
    assert "scripts/txt2img.py" in done.said


@pytest.mark.parametrize("name", ["txt2img", "img2img"])
def test_another_script_names_this_one(script, models, small, name):
    done = script(name, "--ckpt", models["x4"], *(["--init-img", small] if name == "img2img" else []))
    assert done.code == 2
    assert "use scripts/upscale.py with --init-img" in done.said


@pytest.fixture
def txt2img(script, models):
    """Two steps on a tiny text-to-image model, then an upscaler."""
    return lambda *options, upscaler="x2": script(
        "txt2img", "--ckpt", models["text"], "--upscale", 2, "--upscaler", models[upscaler], "--steps", 2, "--W", 32,
        "--H", 32, "--n_iter", 1, "--n_samples", 2, "--safety", "off", "--watermark", "off", "--skip_grid", "--prompt",
        "a fox", *options)  # fmt: skip


def test_what_is_drawn_from_a_prompt_is_drawn_again_at_twice_its_size_before_it_is_decoded(txt2img, script, models):
    first = txt2img()
    assert (first.code, len(first.out), first.err) == (0, 2, [])
    assert {read_image(path).size for path in first.out} == {(64, 64)}
    assert read_record(first.out[0])["run"]["upscaler"][0]["file"] == str(models["x2"])
    again = script("txt2img", "--ckpt", models["text"], "--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()


def test_a_model_that_enlarges_no_latents_is_no_upscaler(txt2img):
    done = txt2img(upscaler="text")
    assert done.code == 2
    assert "is no LatentUpscale2xDiffusion" in done.said


def test_without_the_upscaler_it_says_where_that_belongs(script, models):
    done = script("txt2img", "--ckpt", models["text"], "--upscale", 2)
    assert done.code == 3
    assert "models/ldm/sd-x2-latent-upscaler" in done.said
