"""What a preview shows, and what it costs."""

from dataclasses import replace

import fill
import pytest
import torch
from omegaconf import OmegaConf
from support import GOLDENS, assert_matches
from tiny import KINDS

from ldm.generation.geometry import geometry
from ldm.generation.noise import NoiseSource
from ldm.generation.pipeline import Pipeline
from ldm.generation.preview import Preview, fit_colours, places
from ldm.generation.request import SAMPLERS, Request
from ldm.image.io import read_image
from ldm.util import instantiate_from_config

REQUEST = Request(prompt="a fox", sampler="ddim", steps=3, width=32, height=32)


class Mixer(torch.nn.Module):
    """An autoencoder whose places are a known linear map of the mean colours of their pixels."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, channels, 1)
        self.shrink = torch.nn.AvgPool2d(factor)

    def encode(self, image):
        return self.mix(self.shrink(image))


def pipeline_of(kind: str) -> Pipeline:
    golden, params = KINDS[kind]
    config = OmegaConf.load(GOLDENS / f"{golden}.yaml")
    for name, value in params.items():
        OmegaConf.update(config.model.params, name, value, merge=False)
    return Pipeline(fill.fill_module(instantiate_from_config(config.model).eval(), salt=0), geometry(config.model))


@pytest.fixture
def plain():
    return pipeline_of("text")


def draw(pipeline: Pipeline, *batch: Request, on_step) -> None:
    pipeline.generate(batch, NoiseSource(torch.device("cpu")).of(batch), on_step)


@pytest.mark.parametrize("channels", [3, 4, 16, 64])
def test_the_map_finds_the_colours_that_a_linear_autoencoder_hides_in_any_number_of_channels(plain, channels):
    plain.model.first_stage_model = Mixer(channels, plain.geometry.factor)
    colours = fit_colours(plain.model, replace(plain.geometry, channels=channels))
    assert colours.shape == (channels + 1, 3)
    image = torch.rand(1, 3, 2, 2) * 2 - 1
    with torch.inference_mode():
        mixed = plain.model.first_stage_model.mix(image) * plain.model.scale_factor
    assert_matches(places(mixed) @ colours, image.movedim(1, -1), 1e-3)


@pytest.mark.parametrize("kind", ["text", "pairs", "unconditional"])
def test_the_map_is_the_same_every_time_and_takes_no_noise_from_the_pictures(kind):
    pipeline = pipeline_of(kind)
    before = torch.get_rng_state()
    first = fit_colours(pipeline.model, pipeline.geometry)
    assert_matches(fit_colours(pipeline.model, pipeline.geometry), first)
    assert torch.isfinite(first).all()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_shows_a_clean_guess_at_each_step_which_comes_nearer_to_the_end(plain, sampler):
    guesses, latents = [], []
    draw(plain, replace(REQUEST, sampler=sampler), on_step=lambda x, x0: (latents.append(x), guesses.append(x0)))
    assert [guess.shape for guess in guesses] == [(1, 4, 8, 8)] * 3
    assert not torch.equal(guesses[0], latents[0])
    first, last = ((guess - latents[-1]).abs().mean() for guess in (guesses[0], guesses[-1]))
    assert last < first


def test_a_preview_is_written_every_n_steps_over_the_one_before(tmp_path, plain):
    path = tmp_path / "preview.png"
    preview = Preview(path, 2, lambda: fit_colours(plain.model, plain.geometry), plain.geometry.factor)
    seen = []
    for step in range(1, 6):
        preview(step, torch.full((3, 4, 8, 8), step / 5))
        seen.append(path.read_bytes() if path.exists() else None)
    assert seen[0] is None
    assert seen[1] == seen[2] != seen[3] == seen[4]
    assert [file.name for file in tmp_path.iterdir()] == ["preview.png"]


def test_a_preview_has_the_size_of_the_pictures_and_shows_a_whole_batch(plain):
    preview = Preview("unused.png", 1, lambda: fit_colours(plain.model, plain.geometry), 4)
    assert preview.draw(torch.zeros(1, 4, 8, 16)).size == (64, 32)
    assert preview.draw(torch.zeros(3, 4, 8, 16)).size == (2 * 66 + 2, 2 * 34 + 2)


def test_latents_that_are_not_finite_are_shown_all_the_same(tmp_path, plain):
    preview = Preview(tmp_path / "preview.png", 1, lambda: fit_colours(plain.model, plain.geometry), 4)
    preview(1, torch.full((1, 4, 8, 8), torch.nan))
    assert read_image(tmp_path / "preview.png").size == (32, 32)


def test_a_preview_that_cannot_be_written_is_told_once_and_costs_no_picture(tmp_path, plain, caplog):
    preview = Preview(tmp_path / "gone" / "preview.png", 1, lambda: fit_colours(plain.model, plain.geometry), 4)
    for step in (1, 2, 3):
        preview(step, torch.zeros(1, 4, 8, 8))
    assert [record.message[:11] for record in caplog.records] == ["no preview:"]


def test_an_autoencoder_that_makes_nothing_of_colours_costs_no_picture_either(tmp_path, plain, caplog):
    with torch.no_grad():
        next(plain.model.first_stage_model.parameters()).fill_(torch.nan)
    preview = Preview(tmp_path / "preview.png", 1, lambda: fit_colours(plain.model, plain.geometry), 4)
    preview(1, torch.zeros(1, 4, 8, 8))
    assert "not finite" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_preview_is_the_same_in_mixed_precision(plain, tmp_path):
    preview = Preview(tmp_path / "preview.png", 1, lambda: fit_colours(plain.model, plain.geometry), 4)
    latents = torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = preview.draw(latents)
    assert mixed.tobytes() == preview.draw(latents).tobytes()
