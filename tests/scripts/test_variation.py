"""scripts/variation.py, from the command line to the files, with both kinds of models that vary pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.metadata import read_record

SMALL = ("--ddim_steps", 2, "--watermark", "off", "--safety", "off", "--device", "cpu", "--precision", "full",
         "--skip_grid", "--n_samples", 1)


@pytest.fixture
def vary(script, models, photo):
    """Run it on a tiny model in two steps, without a grid."""

    def run(*options: object, kind: str = "unclip"):
        return script("variation", "--ckpt", models[kind], "--init-img", photo, *SMALL, *options)

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_the_command_varies_a_picture_of_any_size_at_the_models_own(command, models, photo):
    Image.fromarray(pixels(photo)[:37, :51]).save(photo.with_name("odd.png"))
    done = command("variation", "--init-img", "odd.png", "--ckpt", models["variation"], "--steps", 2, "--watermark",
                   "off", "--n_samples", 2)
    assert done.returncode == 0, done.stderr
    outdir = "outputs/variation-samples"
    assert done.stdout.splitlines() == [f"{outdir}/samples/0000{n}.png" for n in (0, 1)] + [f"{outdir}/grid-0000.png"]
    assert pixels(photo.parent / done.stdout.splitlines()[0]).shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["variation", "unclip"])
def test_the_picture_and_the_scale_decide_what_is_drawn(vary, photo, kind):
    Image.fromarray(255 - pixels(photo)).save("other.png")
    options = ((), ("--init-img", "other.png"), ("--scale", 1), ("--seed", 3))
    drawn = [pixels(vary(*more, kind=kind).out[0]) for more in options]
    assert len({one.tobytes() for one in drawn}) == len(options)


def test_prompts_and_the_noise_level_are_for_stable_unclip(vary):
    options = ((), ("--prompt", "a fox"), ("--negative_prompt", "grey"), ("--noise_level", 900))
    drawn = [pixels(vary(*more).out[0]) for more in options]
    assert len({one.tobytes() for one in drawn}) == len(options)
    assert pixels(vary("--noise_level", 0).out[0]).tobytes() == drawn[0].tobytes()


def test_a_variation_is_replayed_byte_for_byte_with_its_noise(vary):
    first = vary("--noise_level", 500, "--n_iter", 2, "--prompt", "a fox", "--sampler", "euler_a")
    request = read_record(first.out[1])["request"]
    assert (request["varies"], request["noise_level"]) == (True, 500)
    again = vary("--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()


def test_with_a_seed_of_its_own_a_picture_is_the_same_at_any_batch_size(vary):
    asked = ("--seed_mode", "image", "--noise_level", 700)
    together = vary(*asked, "--n_samples", 2, "--outdir", "together").out
    alone = vary(*asked, "--seed", 43, "--outdir", "alone").out
    assert np.abs(pixels(together[1]).astype(int) - pixels(alone[0])).max() <= 1  # of 255: rounding


def test_each_row_of_a_file_has_its_own_picture_and_level(vary, photo):
    Image.fromarray(255 - pixels(photo)).save("other.png")
    Path("rows.txt").write_text("a fox --noise_level 3\na fox --init-img other.png\n")
    done = vary("--from-file", "rows.txt")
    assert [read_record(path)["request"]["init_img"] for path in done.out] == [str(photo), "other.png"]
    assert [read_record(path)["request"]["noise_level"] for path in done.out] == [3, None]


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("variation", ("--prompt", "a fox"), ["takes no prompt", "--prompt"]),
    ("variation", ("--negative_prompt", "a fox"), ["takes no prompt", "--negative_prompt"]),
    ("variation", ("--noise_level", 3), ["--noise_level"]),
    ("unclip", ("--noise_level", 1000), ["noise_level", "999", "1000"]),
    ("unclip", ("--init-img", "nowhere.png"), ["there is no picture at nowhere.png"]),
    ("unclip", ("--W", 65), ["W must be a positive multiple of 16", "64"]),
])
def test_what_cannot_be_done_is_one_line_that_says_what_to_do(vary, kind, options, words):
    done = vary(*options, kind=kind)
    assert done.code == 2
    assert all(word in done.said for word in words)


def test_without_a_picture_the_option_is_named(script):
    done = script("variation")
    assert done.code == 2
    assert "--init-img FILE" in done.said
