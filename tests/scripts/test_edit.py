"""scripts/edit.py, from the command line to the files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.io import read_image
from ldm.image.metadata import read_parameters, read_record
from ldm.models.convert import convert

SMALL = ("--ddim_steps", 3, "--watermark", "off", "--safety", "off", "--device", "cpu", "--precision", "full",
         "--skip_grid")


@pytest.fixture
def edit(script, models, photo):
    """Run it on a tiny model in three steps, without a grid."""

    def run(*options: object, kind: str = "edit"):
        return script("edit", "--ckpt", models[kind], "--init-img", photo, *SMALL, *options)

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.array(read_image(path))


def test_without_options_the_numbers_are_those_of_the_original(source):
    args = source("edit")["parse"](["--init-img", "a.png", "--prompt", "make it winter"])
    assert (args.sampler, args.steps, args.scale, args.image_scale, args.strength) == ("euler_a", 100, 7.5, 1.5, 1.0)
    assert source("edit")["parse"](["--init-img", "a.png", "--prompt", "a", "--scale", "3"]).scale == 3.0


def test_prompt_picture_and_both_scales_decide_what_is_drawn(edit, photo):
    Image.fromarray(255 - pixels(photo)).save("other.png")
    options = ((), ("--prompt", "a hare"), ("--init-img", "other.png"), ("--text_scale", 3), ("--image_scale", 1))
    drawn = [pixels(edit("--prompt", "a fox", *more).out[0]) for more in options]
    assert len({one.tobytes() for one in drawn}) == len(options)


def test_a_picture_is_made_again_byte_for_byte_with_its_scales_on_record(edit):
    first = edit("--prompt", "a fox", "--image_scale", 1.25, "--n_iter", 2)
    assert first.out == [f"outputs/edit-samples/samples/0000{number}.png" for number in range(2)]
    assert read_record(first.out[1])["request"]["image_scale"] == 1.25
    assert read_parameters(first.out[1])["Image CFG scale"] == "1.25"
    again = edit("--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()


def test_each_row_of_a_file_has_its_own_scales_and_does_not_depend_on_its_neighbours(edit):
    Path("rows.txt").write_text("a fox --image_scale 1.2\na hare\na hare --negative_prompt grey\n")
    rows = edit("--from-file", "rows.txt", "--n_samples", 3, "--seed_mode", "image")
    assert [read_record(path)["request"]["image_scale"] for path in rows.out] == [1.2, 1.5, 1.5]
    alone = edit("--prompt", "a hare", "--seed", 43, "--seed_mode", "image")
    assert np.abs(pixels(alone.out[0]).astype(int) - pixels(rows.out[1])).max() <= 1


def test_a_folder_in_the_layout_of_diffusers_is_a_checkpoint_too(edit, models, tmp_path):
    convert(models["edit"], tmp_path / "folder", config=models["edit"].with_name("config.yaml"))
    mine, theirs = (edit("--prompt", "a fox", *more) for more in ((), ("--ckpt", tmp_path / "folder")))
    assert np.array_equal(pixels(mine.out[0]), pixels(theirs.out[0]))


@pytest.mark.parametrize(("script_name", "kind", "said"), [
    ("edit", "text", "use scripts/img2img.py, or name an InstructPix2Pix checkpoint"),
    ("img2img", "edit", "use scripts/edit.py"),
    ("inpaint", "edit", "use scripts/edit.py"),
])
def test_a_model_of_another_kind_names_the_script_that_it_is_for(script, models, photo, script_name, kind, said):
    mask = ("--mask", photo) if script_name == "inpaint" else ()
    done = script(script_name, "--ckpt", models[kind], "--init-img", photo, "--prompt", "a fox", *mask, *SMALL)
    assert (done.code, done.out) == (2, [])
    assert said in done.said


@pytest.mark.parametrize(("options", "said"), [
    (("--prompt", "a"), "name the picture to edit with --init-img"),
    (("--init-img", "a.png"), "say what is to change with --prompt"),
    (("--init-img", "a.png", "--prompt", "a", "--image_scale", "nan"), "image_scale must be a finite number"),
])
def test_what_is_missing_or_no_number_is_told_in_one_line(script, options, said):
    done = script("edit", *options)
    assert done.code == 2
    assert said in done.said
