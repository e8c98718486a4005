"""A latent diffusion model of a few thousand weights, whose autoencoder changes nothing."""

import pytest
import torch

from ldm.util import get_obj_from_str

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "channel_mult": [1],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 8,
}
PARAMS = {
    "timesteps": 10,
    "image_size": 8,
    "channels": 4,
    "log_every_t": 5,
    "use_ema": False,
    "conditioning_key": "crossattn",
    "cond_stage_key": "txt",
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "cond_stage_config": {"target": "torch.nn.Identity"},
}


@pytest.fixture
def small_model():
    """Build a model of `ldm.models.diffusion.ddpm`; `unet` and keywords change its parameters."""

    def build(kind: str = "LatentDiffusion", unet: dict | None = None, **params) -> torch.nn.Module:
        config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | (unet or {})}
        torch.manual_seed(0)
        return get_obj_from_str(f"ldm.models.diffusion.ddpm.{kind}")(unet_config=config, **(PARAMS | params))

    return build


@pytest.fixture
def batch():
    """Two pictures (b, h, w, 4) that the autoencoder leaves as they are, and a context (b, 3, 8) each."""
    numbers = torch.Generator().manual_seed(1)
    return {"image": torch.randn(2, 8, 8, 4, generator=numbers), "txt": torch.randn(2, 3, 8, generator=numbers)}
