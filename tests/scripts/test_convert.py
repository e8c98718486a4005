"""scripts/convert.py, as a command; and folders as the checkpoint of another."""

import torch
from PIL import Image, ImageChops

from ldm.checkpoint import read_checkpoint


def test_a_checkpoint_goes_to_a_folder_and_back_and_each_path_is_printed(command, models, tmp_path):
    run = command("convert", models["text"], "folder/")
    assert (run.returncode, run.stdout) == (0, "folder\n"), run.stderr
    run = command("convert", "folder", "back.ckpt")
    assert (run.returncode, run.stdout) == (0, "back.ckpt\n"), run.stderr
    want, got = read_checkpoint(models["text"]), read_checkpoint(tmp_path / "back.ckpt")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_folder_draws_the_picture_of_the_checkpoint_that_it_was_made_of(command, models, tmp_path):
    assert command("convert", models["text"], "folder").returncode == 0
    options = ("--prompt", "a red bench", "--n_samples", 1, "--n_iter", 1, "--steps", 2, "--skip_grid", "--device",
               "cpu", "--precision", "full")
    for name, checkpoint in (("one", models["text"]), ("two", "folder")):
        run = command("txt2img", "--ckpt", checkpoint, "--outdir", name, *options)
        assert run.returncode == 0, run.stderr
    one, two = (Image.open(tmp_path / name / "samples" / "00000.png") for name in ("one", "two"))
    assert ImageChops.difference(one, two).getbbox() is None


def test_options_choose_the_type_and_the_averages(command, models, tmp_path):
    assert command("convert", models["text"], "half.safetensors", "--half", "--no-ema").returncode == 0
    kinds = {weight.dtype for key, weight in read_checkpoint(tmp_path / "half.safetensors").items() if "." in key}
    assert kinds == {torch.float16, torch.int64}
    run = command("convert", models["text"], "ema.safetensors", "--ema")
    assert run.returncode == 3
    assert "has no EMA weights" in run.stderr


def test_nothing_is_overwritten_without_force(command, models, tmp_path):
    (tmp_path / "there.ckpt").write_text("precious")
    run = command("convert", models["text"], "there.ckpt")
    assert run.returncode == 1
    assert "--force" in run.stderr
    assert (tmp_path / "there.ckpt").read_text() == "precious"
    assert command("convert", models["text"], "there.ckpt", "--force").returncode == 0
    assert len(read_checkpoint(tmp_path / "there.ckpt")) == len(read_checkpoint(models["text"]))


def test_what_cannot_be_read_or_written_is_one_line(command, models, tmp_path):
    (tmp_path / "page.ckpt").write_text("<!doctype html>")
    for options, code in ((("page.ckpt", "model.ckpt"), 3), (("absent.ckpt", "model.ckpt"), 3),
                          ((models["text"], "model.zip"), 1), ((models["text"],), 2)):
        run = command("convert", *options)
        assert run.returncode == code, run.stderr
        assert run.stderr.count("\n") == 1
        assert not run.stdout
