"""Latents kept on the disk, training on them, and the folder that is put together in the end."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.data.latents import CachedLatents
from ldm.data.shapes import ShapesDataset
from ldm.training.latent import CachedLatentDiffusion, cut

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
    for name in ("sample_posterior", "windows"):  # of training alone
        config.model.params.pop(name)
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert 2 * (parameters + 1.75e6) <= 30e6  # bytes in half precision, with both towers of CLIP
    whole = OmegaConf.load("configs/shapes/autoencoder.yaml").model.params.ddconfig
    assert config.model.params.first_stage_config.params.ddconfig == whole


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_lie_within_a_picture_about_the_places_where_it_changes():
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 64, 48)
    x[0, :, 40:43, 3:7], x[1, :, :2, 40:] = 1.0, 2.0
    windows = cut(x, each=50, side=5)
    assert windows.shape == (100, 1, 5, 5)
    with_outline = [len(window.unique()) == 2 for window in windows]
    assert sum(with_outline) > 75  # of windows anywhere, three
    assert windows[:50].max() == 1.0 and windows[50:].max() == 2.0


def test_a_flat_picture_has_windows_too():
    assert torch.equal(cut(torch.ones(1, 4, 8, 8), each=3, side=8), torch.ones(3, 4, 8, 8))


@pytest.fixture
def batch() -> dict:
    """Two pictures' moments of a variance that shows, (b, h, w, 2c), and a context for each."""
    numbers = torch.Generator().manual_seed(1)
    return {"image": torch.randn(2, 8, 8, 8, generator=numbers), "txt": torch.randn(2, 3, 8, generator=numbers)}


def small_model(**options) -> CachedLatentDiffusion:
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
            "num_res_blocks": 1, "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8}
    torch.manual_seed(0)
    return CachedLatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_config={"target": "torch.nn.Identity"},
        timesteps=1000, image_size=8, channels=4, use_ema=False, conditioning_key="crossattn", cond_stage_key="txt",
        **options,
    )  # fmt: skip


def test_timesteps_of_a_density_follow_it_and_each_batch_covers_it():
    model = small_model()
    draws = torch.stack([model.timesteps_around(8, mean=-0.5, std=0.7) for _ in range(500)])
    normal = (torch.logit((draws + 0.5) / 1000) + 0.5) / 0.7
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    eighths = (torch.special.ndtr(normal) * 8).long().clamp(max=7)
    covered = [len(set(batch.tolist())) for batch in eighths]
    assert sum(covered) / len(covered) > 7.5  # rounding to whole timesteps may move one over a border
    assert len(draws.unique()) > 200


def test_the_loss_of_windows_is_added_in_training_at_timesteps_of_their_own(batch):
    windows = {"side": 4, "each": 3, "timestep_density": {"mean": -4.0, "std": 0.1}}
    model, seen = small_model(windows=windows), []
    network = model.model.forward

    def watched(x, t, **cond):
        seen.append((x.shape, t, cond["c_crossattn"][0]))
        return network(x, t, **cond)

    model.model.forward = watched
    loss, parts = model.train().shared_step(batch)
    (whole, _, context), (pieces, t, contexts) = seen
    assert (whole, pieces) == ((2, 4, 8, 8), (6, 4, 4, 4))
    assert t.max() < 30 and torch.equal(contexts, context.repeat_interleave(3, dim=0))
    torch.testing.assert_close(loss, parts["train/loss"] + parts["train/loss_windows"])
    loss, parts = model.eval().shared_step(batch)
    assert len(seen) == 3 and "val/loss_windows" not in parts
    torch.testing.assert_close(loss, parts["val/loss"])


@pytest.mark.parametrize("sampled", [True, False])
def test_the_latent_is_a_draw_from_the_posterior_or_its_mean(batch, sampled):
    latent, _ = small_model(sample_posterior=sampled).get_input(batch, "image")
    assert torch.equal(latent, batch["image"].movedim(-1, 1)[:, :4]) != sampled
