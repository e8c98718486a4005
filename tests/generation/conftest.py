"""Tiny models as pipelines, and pictures to start from."""

from functools import cache

import fill
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from ldm.generation.geometry import geometry
from ldm.generation.noise import NoiseSource
from ldm.generation.pipeline import Pipeline
from ldm.modules.attention_ops import set_attention
from ldm.modules.bands import set_band
from ldm.util import instantiate_from_config


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Bands and attention are those of the process; what a run in a test has set is taken back."""
    band, attention = set_band(1), set_attention("sdpa")
    set_band(band)
    set_attention(attention)
    yield
    set_band(band)
    set_attention(attention)


@pytest.fixture(scope="session")
def pipeline():
    """The pipeline of a kind of tiny model, in float32 on the CPU. Shared between tests: leave it as it is."""

    @cache
    def of(kind: str) -> Pipeline:
        config = tiny_config(kind)
        model = fill.fill_module(instantiate_from_config(config.model), salt=0)
        return Pipeline(model.eval().requires_grad_(False), geometry(config.model))

    return of


@pytest.fixture
def draw(pipeline):
    """The pixels (h, w, 3) of each request of a batch, from fresh noise: draw("text", Request(...), Request(...))."""

    def drawn(kind: str, *batch) -> list[np.ndarray]:
        noise = NoiseSource(torch.device("cpu")).of(batch)
        return [np.asarray(picture.image) for picture in pipeline(kind).generate(batch, noise)]

    return drawn


@pytest.fixture
def photo(tmp_path):
    """A picture of 32x32 pixels, of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def mask(tmp_path):
    """The mask of `photo` whose left half is repainted."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")
