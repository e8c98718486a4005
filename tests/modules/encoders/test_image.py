"""Encoders of pictures and the noise that is added to what they see."""

import json

import pytest
import torch
from support import manifest

from ldm.errors import ConfigError
from ldm.modules.encoders.modules import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenCLIPImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.openclip import VisualTransformer

LEVELS = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32,
         "patch_size": 8, "projection_dim": 24}


@pytest.fixture
def folder(tmp_path):
    """A tower of a few thousand weights, described and without them."""
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    return str(tmp_path)


def test_the_tower_of_openclip_has_its_known_size_and_names():
    with torch.device("meta"):
        encoder = FrozenOpenCLIPImageEmbedder()
    assert sum(weight.numel() for weight in encoder.model.visual.parameters()) == 632_076_800
    beside = {key: tuple(weight.shape) for key, weight in encoder.state_dict().items() if "visual" not in key}
    text = {key.removeprefix("cond_stage_model."): shape for key, (shape, _) in manifest("sd-v2-base").items()}
    assert beside == {key: text[key] for key in beside}
    assert not any("model.transformer" in key for key in beside)


def test_both_towers_of_openai_have_the_same_names():
    with torch.device("meta"):
        assert ClipImageEmbedder().state_dict().keys() == FrozenCLIPImageEmbedder().state_dict().keys()


@pytest.mark.parametrize("kind", [ClipImageEmbedder, FrozenOpenCLIPImageEmbedder])
def test_a_folder_describes_a_tower_and_says_where_its_weights_are_not(kind, folder, caplog):
    encoder = kind(folder)
    assert isinstance(encoder.model.visual, VisualTransformer)
    assert encoder(torch.zeros(2, 3, 40, 50)).shape == (2, 24)
    assert encoder.antialias
    assert f"{folder} has none" in caplog.text


def test_vectors_are_dropped_in_training_alone(folder):
    encoder = FrozenCLIPImageEmbedder(folder, ucg_rate=1.0)
    picture = torch.rand(1, 3, 32, 32)
    assert encoder.eval()(picture).abs().max() > 0
    assert encoder.train()(picture).abs().max() == 0


def test_what_describes_no_tower_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48}))
    with pytest.raises(ConfigError, match="projection_dim"):
        ClipImageEmbedder(folder)
    with pytest.raises(ConfigError, match="ViT-H-14"):
        FrozenOpenCLIPImageEmbedder("ViT-X-1")
    with pytest.raises(ConfigError, match="pooled"):
        FrozenOpenCLIPImageEmbedder(layer="penultimate")


def test_noise_is_in_the_units_of_the_statistics_and_its_level_is_told(tmp_path):
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    torch.save((mean, std), tmp_path / "stats.th")
    model = CLIPEmbeddingNoiseAugmentation(LEVELS, clip_stats_path=str(tmp_path / "stats.th"), timestep_dim=2)
    x, noise, level = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 400, 999])
    noised, told = model(x, noise_level=level, noise=noise)
    kept = model.alphas_cumprod[level][:, None]
    torch.testing.assert_close(noised, mean + kept**0.5 * (x - mean) + (1 - kept) ** 0.5 * std * noise)
    torch.testing.assert_close(told, torch.stack([level.cos(), level.sin()], dim=1))


def test_without_statistics_they_are_0_and_1_and_keep_float32_on_meta_too():
    with torch.device("meta"):
        model = CLIPEmbeddingNoiseAugmentation(LEVELS, timestep_dim=4)
    model.to(torch.bfloat16)
    assert (model.data_mean.tolist(), model.data_std.tolist()) == ([[0.0] * 4], [[1.0] * 4])
    assert model.data_mean.dtype == torch.float32


def test_statistics_that_are_nowhere_are_asked_for_when_they_are_needed(tmp_path):
    path = str(tmp_path / "stats.th")
    model = CLIPEmbeddingNoiseAugmentation(LEVELS, clip_stats_path=path, timestep_dim=2)
    with pytest.raises(ConfigError, match="put their file"):
        model(torch.zeros(1, 2))
    model.load_state_dict({"data_mean": torch.zeros(1, 2), "data_std": torch.ones(1, 2)}, strict=False)
    assert model(torch.zeros(1, 2))[0].shape == (1, 2)
    torch.save({"mean": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="mean and a standard deviation of 2"):
        CLIPEmbeddingNoiseAugmentation(LEVELS, clip_stats_path=path, timestep_dim=2)
