"""Every member of the family with the scripts that it is for: samplers by rotation, rows, records, replays, less
memory and Safe Latent Diffusion; and with one that it is not for, which names the right one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import KINDS

from ldm.image.io import read_image
from ldm.image.metadata import read_record
from ldm.sampling import SAMPLERS

SMALL = ("--ddim_steps", 2, "--seed_mode", "image", "--n_iter", 1, "--skip_grid", "--watermark", "off",
         "--safety", "off", "--device", "cpu", "--precision", "full")
NEW = ("--W", 32, "--H", 32)
PICTURE = ("--init-img", "photo.png")
MASKED = (*PICTURE, "--mask", "mask.png")
EACH = 3  # samplers of a cell

# Member, script, what it needs beside a prompt, and the side of what is drawn.
CELLS = [
    ("text", "txt2img", NEW, 32),
    ("text", "img2img", PICTURE, 32),
    ("text", "inpaint", MASKED, 32),
    ("v", "txt2img", NEW, 32),
    ("v", "img2img", PICTURE, 32),
    ("inpaint", "inpaint", MASKED, 32),
    ("edit", "edit", PICTURE, 32),
    ("depth", "depth2img", PICTURE, 32),
    ("x4", "upscale", ("--init-img", "small.png"), 64),
    ("x2", "upscale", ("--init-img", "small.png", "--scale_factor", 2), 32),
    ("xl", "txt2img", NEW, 32),
    ("xl", "inpaint", MASKED, 32),
    ("refiner", "img2img", PICTURE, 32),
    ("rgbd", "txt2img", NEW, 32),
    ("rgbd-x2", "upscale", ("--init-img", "small.png", "--depth-img", "small_depth.png", "--scale_factor", 2), 32),
    ("variation", "variation", (*PICTURE, *NEW), 32),
    ("unclip", "variation", (*PICTURE, *NEW), 32),
    ("pairs", "inpaint", MASKED, 32),
    ("xl", "txt2img", NEW, 32),
    ("xl", "inpaint", MASKED, 32),
    ("refiner", "img2img", PICTURE, 32),
]
PROMPTLESS = ("pairs", "variation")
# Those that have a command line of another kind: a sampler, not rows of them.
OTHERS = [("unconditional", ()), ("classes", ("--classes", 3))]

# Member, a script that is not for it, and what that one says.
STRANGERS = [
    ("text", "edit", "img2img.py"),
    ("v", "depth2img", "txt2img.py"),
    ("inpaint", "img2img", "inpaint.py"),
    ("edit", "inpaint", "edit.py"),
    ("depth", "txt2img", "depth2img.py"),
    ("x4", "img2img", "upscale.py"),
    ("x2", "txt2img", "upscale.py"),
    ("xl", "edit", "img2img.py"),
    ("refiner", "depth2img", "txt2img.py"),
    ("rgbd", "img2img", "txt2img.py"),
    ("rgbd-x2", "txt2img", "upscale.py"),
    ("variation", "txt2img", "variation.py"),
    ("unclip", "img2img", "variation.py"),
    ("pairs", "txt2img", "inpaint.py"),
    ("xl", "edit", "img2img.py"),
    ("refiner", "depth2img", "txt2img.py"),
    ("unconditional", "txt2img", "sample_diffusion.py"),
    ("classes", "img2img", "sample_diffusion.py"),
]


@pytest.fixture(autouse=True)
def pictures(tmp_path):
    """A picture of 32x32 pixels, its quarter with a depth map, and a mask of its left half, in the working folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(pixels[:16, :16]).save(tmp_path / "small.png")
    Image.fromarray(pixels[:16, :16, 0]).save(tmp_path / "small_depth.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")


def rotated(number: int) -> list[str]:
    """The samplers of a cell; the next one goes on where it ends."""
    return [list(SAMPLERS)[(EACH * number + step) % len(SAMPLERS)] for step in range(EACH)]


def test_every_member_has_a_script_here_and_a_stranger_and_every_sampler_its_members():
    assert {member for member, *_ in (*CELLS, *OTHERS)} == {member for member, *_ in STRANGERS} == set(KINDS)
    assert {sampler for number in range(len(CELLS)) for sampler in rotated(number)} == set(SAMPLERS)


@pytest.mark.parametrize("number", range(len(CELLS)), ids=["-".join(cell[:2]) for cell in CELLS])
def test_a_member_draws_rows_with_its_samplers_and_makes_the_last_again_byte_for_byte(script, models, number):
    member, name, needs, side = CELLS[number]
    samplers = rotated(number)
    prompt, safe = ("", "") if member in PROMPTLESS else ("a fox", " --safe 500,0,0.2,0.5,0.7")
    Path("rows.txt").write_text("\n".join(f"{prompt} --sampler {sampler}" for sampler in samplers) + safe)
    options = ("--ckpt", models[member], *SMALL)
    first = script(name, *options, *needs, "--from-file", "rows.txt")
    assert first.code == 0, first.err
    drawn = [path for path in first.out if Path(path).stem.isdigit()]  # without the depth maps
    assert [read_record(path)["request"]["sampler"] for path in drawn] == samplers
    assert {read_image(path).size for path in drawn} == {(side, side)}
    assert len({read_image(path).tobytes() for path in drawn}) == EACH
    again = script(name, *options, "--replay", drawn[-1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(drawn[-1]).read_bytes()
    less = script(name, *options, "--replay", drawn[-1], "--outdir", "less", "--memory", "lowest")
    assert np.abs(np.asarray(read_image(less.out[0]), int) - read_image(drawn[-1])).max() <= 1


@pytest.mark.parametrize(("member", "options"), OTHERS)
def test_a_member_without_prompts_draws_too(script, models, member, options):
    for sampler in ("dpm2", "unipc"):
        first = script("sample_diffusion", "-r", models[member], "-n", 2, *SMALL, *options, "--sampler", sampler)
        assert (first.code, len(first.out)) == (0, 2), first.err
    again = script("sample_diffusion", "-r", models[member], *SMALL, "--replay", first.out[1], "--outdir", "again")
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()


@pytest.mark.parametrize(("member", "name", "said"), STRANGERS)
def test_a_script_that_a_member_is_not_for_names_the_one_that_it_is_for(script, models, member, name, said):
    needs = {"txt2img": (), "inpaint": MASKED}.get(name, PICTURE)
    done = script(name, "--ckpt", models[member], *SMALL, *needs, "--prompt", "a fox")
    assert (done.code, done.out) == (2, [])
    assert f"scripts/{said}" in done.said
