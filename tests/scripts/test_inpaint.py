"""scripts/inpaint.py, from the command line to the files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.io import read_image
from ldm.image.metadata import read_record

SMALL = ("--ddim_steps", 3, "--watermark", "off", "--safety", "off", "--device", "cpu", "--precision", "full")


@pytest.fixture
def inpaint(script, models):
    """Run it on a tiny model, the one made for inpainting by default, in three steps, without a grid."""

    def run(*options: object, kind: str = "inpaint"):
        return script("inpaint", "--ckpt", models[kind], *SMALL, "--skip_grid", *options)

    return run


@pytest.fixture
def folder(tmp_path, photo, mask):
    """Two pictures with their masks, one picture without, and a mask that is no file of a pair by its name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png", "alone.png"):
        (folder / name).write_bytes(photo.read_bytes())
    for name in ("a_mask.png", "b_mask.png", "mask.png"):
        (folder / name).write_bytes(mask.read_bytes())
    return folder


def pixels(path: str | Path) -> np.ndarray:
    return np.array(read_image(path))


def test_the_command_repaints_a_part_of_a_picture(command, models, photo, mask, tmp_path):
    done = command("inpaint", "--prompt", "a red bench", "--init-img", photo, "--mask", mask,
                   "--ckpt", models["inpaint"], "--ddim_steps", 3, "--watermark", "off")
    assert done.returncode == 0, done.stderr
    outdir = "outputs/inpaint-samples"
    assert done.stdout.splitlines() == [f"{outdir}/samples/00000.png", f"{outdir}/grid-0000.png"]
    drawn, was = pixels(tmp_path / done.stdout.split()[0]), pixels(photo)
    assert np.array_equal(drawn[:, 32:], was[:, 32:])
    assert not np.array_equal(drawn[:, :32], was[:, :32])


@pytest.mark.parametrize("kind", ["text", "v", "inpaint", "pairs"])
@pytest.mark.parametrize("strength", [0.5, 1])
def test_what_is_black_in_the_mask_comes_back_unchanged_from_every_kind_of_model(inpaint, photo, mask, kind, strength):
    done = inpaint("--init-img", photo, "--mask", mask, "--strength", strength, "--n_samples", 2, kind=kind)
    first, second, was = *map(pixels, done.out), pixels(photo)
    for drawn in (first, second):
        assert np.array_equal(drawn[:, 32:], was[:, 32:])
        assert (drawn[:, :32] != was[:, :32]).any(axis=2).mean() > 0.9
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("kind", ["text", "inpaint"])
def test_the_prompt_decides_what_is_painted(inpaint, photo, mask, kind):
    options = ("--init-img", photo, "--mask", mask)
    fox, hare = (inpaint(*options, "--prompt", prompt, kind=kind) for prompt in ("a fox", "a hare"))
    assert not np.array_equal(pixels(fox.out[0]), pixels(hare.out[0]))


@pytest.mark.parametrize("kind", ["text", "inpaint", "pairs"])
def test_what_is_painted_depends_on_what_is_around_it(inpaint, photo, mask, kind):
    other = np.array(read_image(photo))
    other[:, 32:] = 255 - other[:, 32:]
    Image.fromarray(other).save("other.png")
    one, two = (inpaint("--init-img", path, "--mask", mask, kind=kind) for path in (photo, "other.png"))
    assert not np.array_equal(pixels(one.out[0])[:, :32], pixels(two.out[0])[:, :32])


@pytest.mark.parametrize("kind", ["inpaint", "pairs"])
def test_a_model_made_for_inpainting_does_not_see_what_is_under_the_mask(inpaint, photo, mask, kind):
    other = np.array(read_image(photo))
    other[:, :32] = 255 - other[:, :32]
    Image.fromarray(other).save("other.png")
    one, two = (inpaint("--init-img", path, "--mask", mask, kind=kind) for path in (photo, "other.png"))
    assert np.array_equal(pixels(one.out[0]), pixels(two.out[0]))


def test_a_black_mask_gives_the_picture_itself_and_a_white_one_nothing_of_it(inpaint, photo):
    for name, level in (("black.png", 0), ("white.png", 255)):
        Image.new("L", (64, 64), level).save(name)
    same = inpaint("--init-img", photo, "--mask", "black.png", kind="text")
    assert np.array_equal(pixels(same.out[0]), pixels(photo))
    new = inpaint("--init-img", photo, "--mask", "white.png", kind="text")
    assert (pixels(new.out[0]) != pixels(photo)).any(axis=2).mean() > 0.9


def test_a_mask_of_another_size_is_resized_with_a_notice(inpaint, photo):
    mask = Image.new("L", (10, 20))
    mask.paste(255, (0, 0, 5, 20))
    mask.save("small.png")
    done = inpaint("--init-img", photo, "--mask", "small.png")
    assert done.said == f"the mask small.png is not of the size of {photo}: it is resized to it"
    drawn, was = pixels(done.out[0]), pixels(photo)
    assert np.array_equal(drawn[:, 32:], was[:, 32:])
    assert not np.array_equal(drawn[:, :32], was[:, :32])


@pytest.mark.parametrize("kind", ["text", "inpaint", "pairs"])
def test_a_picture_is_made_again_byte_for_byte(inpaint, photo, mask, kind):
    first = inpaint("--init-img", photo, "--mask", mask, "--n_iter", 2, kind=kind)
    again = inpaint("--replay", first.out[1], "--outdir", "again", kind=kind)
    assert Path(again.out[0]).read_bytes() == Path(first.out[1]).read_bytes()
    assert read_record(first.out[1])["request"]["mask"] == str(mask)


def test_a_folder_of_pairs_keeps_its_names_and_what_is_there_is_left_as_it_is(inpaint, folder):
    done = inpaint("--indir", folder, "--outdir", "out", kind="pairs")
    assert (done.code, done.out, done.err) == (0, ["out/a.png", "out/b.png"], [])
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png", "manifest.jsonl"]
    assert np.array_equal(pixels("out/b.png")[:, 32:], pixels(folder / "b.png")[:, 32:])
    Path("out/b.png").unlink()
    before = Path("out/a.png").read_bytes()
    again = inpaint("--indir", folder, "--outdir", "out", kind="pairs")
    assert again.out == ["out/b.png"]
    assert again.said == "1 of 2 pictures are in out already and left as they are"
    assert Path("out/a.png").read_bytes() == before
    nothing = inpaint("--indir", folder, "--outdir", "out", kind="pairs")
    assert (nothing.code, nothing.out) == (0, [])


def test_a_folder_of_pairs_that_is_gone_on_with_has_the_files_of_one_run_byte_for_byte(inpaint, folder):
    for name in "cd":
        (folder / f"{name}.png").write_bytes((folder / "a.png").read_bytes())
        (folder / f"{name}_mask.png").write_bytes((folder / "a_mask.png").read_bytes())

    def run(*options, code=0):
        done = inpaint("--indir", folder, "--outdir", "out", *options, kind="pairs")
        assert done.code == code, done
        return [Path(path).name for path in done.out]

    assert run() == ["a.png", "b.png", "c.png", "d.png"]
    files = {name: Path("out", name).read_bytes() for name in ("a.png", "b.png", "c.png", "d.png")}
    assert len(set(files.values())) == 4  # each has noise of its own
    Path("out/b.png").unlink()
    Path("out/d.png").write_bytes(b"altered")
    assert run() == ["b.png"]  # from the run's first noise; and what is there is not looked at
    assert run("--resume") == ["d.png"]
    assert Path("out/d.png").read_bytes() == files["d.png"]
    Path("out/b.png").unlink()
    Path("out/manifest.jsonl").write_text("".join(Path("out/manifest.jsonl").read_text().splitlines(True)[:6]))
    assert run("--resume") == ["b.png"]
    assert {name: Path("out", name).read_bytes() for name in files} == files

    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "e_mask.png").write_bytes((folder / "b_mask.png").read_bytes())
    Path("out/e.png").write_bytes(b"mine")
    Image.new("RGB", (64, 64), "red").save(folder / "c.png")
    (folder / "a_mask.png").write_bytes(b"no picture")
    assert run("--resume", code=2) == []
    (folder / "a_mask.png").write_bytes((folder / "b_mask.png").read_bytes())
    assert run("--resume") == ["c.png"]
    assert Path("out/e.png").read_bytes() == b"mine"


def test_a_folder_of_pairs_runs_as_a_command(command, models, folder):
    done = command("inpaint", "--indir", folder, "--outdir", "out", "--ckpt", models["pairs"], "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["out/a.png", "out/b.png"]


def test_a_folder_without_its_model_says_where_it_belongs(script, folder):
    done = script("inpaint", "--indir", folder)
    assert done.code == 3
    assert "models/ldm/inpainting_big/last.ckpt" in done.said
