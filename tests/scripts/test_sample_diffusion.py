"""scripts/sample_diffusion.py, from the command line to the files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.image.io import read_image
from ldm.image.metadata import read_record
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.load import load_model

SMALL = ("--watermark", "off", "--safety", "off", "--device", "cpu", "--precision", "full")


@pytest.fixture
def sample(script, models):
    """Run it on a tiny model, by the folder that it lies in."""

    def run(kind: str, *options: object):
        return script("sample_diffusion", "-r", models[kind].parent, *SMALL, *options)

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.array(read_image(path))


def test_the_command_draws_as_many_as_it_is_asked_for(command, models):
    done = command("sample_diffusion", "-r", models["unconditional"], "-n", 3, "--batch_size", 2, "-c", 2)
    assert done.returncode == 0, done.stderr
    outdir = "outputs/diffusion-samples"
    assert done.stdout.splitlines() == [*(f"{outdir}/samples/0000{k}.png" for k in range(3)), f"{outdir}/grid-0000.png"]


def test_an_unconditional_model_draws_what_the_old_ddim_class_draws(sample, models):
    done = sample("unconditional", "-n", 2, "-c", 5, "-e", 0.5, "--seed", 3, "--skip_grid")
    model = load_model(models["unconditional"].with_name("config.yaml"), models["unconditional"])
    torch.manual_seed(3)
    with torch.no_grad():
        latents, _ = DDIMSampler(model).sample(5, 2, (4, 16, 16), eta=0.5, verbose=False)
        decoded = (255 * ((model.decode_first_stage(latents) + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1)
    for path, picture in zip(done.out, decoded.numpy().astype(np.uint8), strict=True):
        assert np.abs(pixels(path).astype(int) - picture).max() <= 1


def test_each_class_is_drawn_as_often_as_asked_and_the_picture_depends_on_it(sample):
    done = sample("classes", "--classes", "1,7", "-n", 2, "-c", 4, "--scale", 3, "-e", 0, "--fixed_code",
                  "--batch_size", 2)
    *samples, grid = done.out
    assert [read_record(path)["request"]["class_label"] for path in samples] == [1, 1, 7, 7]
    # A fixed code starts both batches alike: what differs is the class.
    assert not np.array_equal(pixels(samples[0]), pixels(samples[2]))
    assert pixels(grid).shape == (134, 134, 3)


def test_guidance_steers_a_class_away_from_no_class(sample):
    plain, guided = (sample("classes", "--classes", "1", "-n", 1, "-c", 3, "--scale", scale, "--skip_grid")
                     for scale in (1, 4))
    assert not np.array_equal(pixels(plain.out[0]), pixels(guided.out[0]))


def test_vanilla_sampling_is_the_ancestral_chain_over_every_step(source, sample):
    args = source("sample_diffusion")["parse"](["-r", "model.ckpt", "-v", "-c", "20"])
    assert (args.sampler, args.steps, args.eta) == ("ddpm", 1000, 0.0)
    assert sample("unconditional", "--sampler", "ddpm", "-c", 3, "-n", 1, "--skip_grid").code == 0


@pytest.mark.parametrize(("options", "eta"), [([], 1.0), (["-e", 0], 0.0), (["--sampler", "plms"], 0.0)])
def test_eta_is_1_for_ddim_as_in_the_original_and_0_for_those_that_take_none(sample, options, eta):
    done = sample("unconditional", "-n", 1, "-c", 2, "--skip_grid", *options)
    assert read_record(done.out[0])["request"]["eta"] == eta


def test_a_picture_of_a_later_batch_is_made_again_byte_for_byte(sample):
    first = sample("classes", "--classes", "1,7", "-n", 2, "-c", 3, "--batch_size", 3, "--skip_grid")
    again = sample("classes", "--replay", first.out[3], "-l", "again")
    assert again.out == ["again/samples/00000.png"]
    assert Path(again.out[0]).read_bytes() == Path(first.out[3]).read_bytes()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classes", ["--classes", "11"], "this model draws classes 0 to 10, got 11"),
        ("classes", ["--classes", "3,-1"], "this model draws classes 0 to 10, got -1"),
        ("classes", [], "this model draws classes 0 to 10: use scripts/sample_diffusion.py --classes N"),
        ("unconditional", ["--classes", "3"], "this model has no classes: leave --classes out"),
        ("classes", ["--classes", "fox"], "must be numbers with commas between them"),
        ("unconditional", ["-n", 0], "n_samples must be at least 1, got 0"),
        ("unconditional", ["--batch_size", 0], "the pictures in a batch must be at least 1, got 0"),
    ],
)
def test_classes_and_counts_that_cannot_be_drawn_are_wrong_usage(sample, kind, options, message):
    done = sample(kind, "-c", 2, *options)
    assert (done.code, done.out) == (2, [])
    assert message in done.said


def test_the_checkpoint_must_be_named(script):
    done = script("sample_diffusion")
    assert done.code == 2
    assert "-r PATH" in done.said
