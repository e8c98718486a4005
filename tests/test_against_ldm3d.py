"""LDM3D on the same weights as in diffusers: the same latents, the same colours, the same depth."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessorLDM3D
from tiny import write_model

from ldm.config import load_config
from ldm.generation.geometry import geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.models.convert import convert
from ldm.models.load import load_model

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
         "clip_sample": False, "set_alpha_to_one": False}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LDM3D in the layout of diffusers."""
    root = tmp_path_factory.mktemp("rgbd")
    convert(write_model(root, "rgbd"), root / "folder", config=root / "config.yaml")
    return root / "folder"


@torch.no_grad()
def test_picture_and_depth_are_those_of_diffusers_also_of_a_panorama(folder):
    config = load_config(folder.parent / "config.yaml")
    pipeline = Pipeline(load_model(config, folder), geometry(config.model))
    request = Request("a red bench", "grey", sampler="ddim", steps=5, scale=5.0, width=128, height=64)
    (ours,) = pipeline.generate([request], Noise([seeded()]))

    run = diffusers.StableDiffusionLDM3DPipeline.from_pretrained(folder)
    run.scheduler = diffusers.DDIMScheduler(**BETAS)
    run.set_progress_bar_config(disable=True)
    latents = []
    theirs = run(request.prompt, negative_prompt=request.negative_prompt, num_inference_steps=5, guidance_scale=5.0,
                 latents=torch.randn(1, 4, 16, 32, generator=seeded()), output_type="np",
                 callback_on_step_end=lambda pipeline, step, t, told: latents.append(told["latents"]) or {})
    # Their depth of this output is of floats taken for bytes, so it is put together from what they decode.
    decoded = run.vae.decode(latents[-1] / run.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    levels = 255 * (decoded / 2 + 0.5).clamp(0, 1).numpy()

    assert ours.image.size == ours.depth.size == (128, 64)
    assert np.abs(np.asarray(ours.image) - 255 * theirs.rgb[0]).max() <= 1.01
    want = VaeImageProcessorLDM3D.rgblike_to_depthmap(levels[..., 3:].round().astype(np.int32))
    # A byte that lies on the edge between two is rounded either way: the low one is off by 1, the high one by 256.
    off = np.abs(np.asarray(ours.depth).astype(np.int64) - want)
    assert set(np.unique(off)) <= {0, 1, 255, 256, 257}
    assert np.mean(off > 0) < 0.01
