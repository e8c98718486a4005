"""Latents kept on the disk, training on them, and the folder that is put together in the end."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.latents import CachedLatents
from ldm.data.shapes import ShapesDataset

FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 2, "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {"z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
                     "num_res_blocks": 1, "attn_resolutions": [], "attn_type": "none", "norm_channels": 8},
    },
}  # fmt: skip
SOURCE = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": 5, "seed": 3, "size": 16}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> CachedLatents:
    torch.manual_seed(0)
    return CachedLatents(str(tmp_path_factory.mktemp("kept")), SOURCE, FIRST_STAGE, batch_size=2)


def test_moments_and_captions_are_kept_in_the_order_of_the_source(kept):
    assert [kept[i]["caption"] for i in range(5)] == [ShapesDataset(**SOURCE["params"])[i]["caption"] for i in range(5)]
    assert kept[4]["image"].shape == (8, 8, 4)
    assert kept[4]["image"].dtype == np.float32
    assert not np.array_equal(kept[0]["image"], kept[1]["image"])


def test_a_full_folder_is_read_without_source_or_autoencoder(kept):
    again = CachedLatents(str(kept.folder), {"target": "no.source"}, {"target": "no.autoencoder"})
    np.testing.assert_array_equal(again[2]["image"], kept[2]["image"])


def test_an_interrupted_filling_goes_on_where_it_stopped(kept, tmp_path):
    moments = kept.moments.copy()
    moments[3:] = 0
    np.save(tmp_path / "moments.npy", moments)
    (tmp_path / "progress.json").write_text(json.dumps(kept.captions[:3]))
    torch.manual_seed(0)  # the same autoencoder again
    found = CachedLatents(str(tmp_path), SOURCE, FIRST_STAGE, batch_size=2)
    assert found.captions == kept.captions
    np.testing.assert_allclose(found.moments, kept.moments, atol=2e-3)
    assert not (tmp_path / "progress.json").exists()


def test_the_recipe_s_configs_describe_models_that_fit_the_size_that_ships():
    from ldm.models.load import build_model

    config = OmegaConf.load("configs/shapes/latent.yaml")
    config.model.target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    config.model.params.cond_stage_config = {"target": "torch.nn.Identity"}
    config.model.params.first_stage_config.params.pop("ckpt_path")
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert 2 * (parameters + 1.75e6) <= 30e6  # bytes in half precision, with both towers of CLIP
    whole = OmegaConf.load("configs/shapes/autoencoder.yaml").model.params.ddconfig
    assert config.model.params.first_stage_config.params.ddconfig == whole
