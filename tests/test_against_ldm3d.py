"""LDM3D on the same weights as in diffusers: the same latents, the same colours, the same depth."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessorLDM3D
from PIL import Image
from support import GOLDENS, assert_matches
from tiny import write_model

from ldm.config import load_config
from ldm.generation.geometry import geometry
from ldm.generation.inputs import read_inputs
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.image.io import read_shares
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


@torch.no_grad()
def test_a_pair_is_enlarged_as_by_their_networks(tmp_path):
    """The arithmetic of diffusers' community pipeline StableDiffusionUpscaleLDM3DPipeline, with the mean of the
    posterior where that draws from it."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), num_class_embeds=1000,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    vae = diffusers.AutoencoderKL(
        in_channels=4, out_channels=4, block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16).eval()
    clip, scheduler = GOLDENS / "tiny-clip", diffusers.DDIMScheduler(**BETAS)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(clip)).eval()
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler,
             "tokenizer": transformers.CLIPTokenizer.from_pretrained(clip)}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "folder" / name)
    (tmp_path / "folder" / "model_index.json").write_text('{"_class_name": "StableDiffusionUpscaleLDM3DPipeline"}')

    numbers = np.random.default_rng(0)
    colours, depth = numbers.integers(0, 256, (16, 24, 3), np.uint8), numbers.integers(0, 65536, (16, 24), np.uint16)
    files = {"init_img": str(tmp_path / "small.png"), "depth_img": str(tmp_path / "small_depth.png")}
    Image.fromarray(colours).save(files["init_img"])
    Image.fromarray(depth).save(files["depth_img"])
    config = load_config(tmp_path / "folder")
    pipeline = Pipeline(load_model(config, tmp_path / "folder"), geometry(config.model))
    latents = []
    (ours,) = pipeline.generate([Request("a red bench", sampler="ddim", steps=4, scale=3.0, upscale=2, **files)],
                                Noise([seeded()]), lambda x, *_: latents.append(x.clone()))

    given = read_inputs(Request(upscale=2, **files), pipeline.geometry).tensors(torch.device("cpu"))
    small = vae.encode(torch.cat([given.image, given.depth], dim=1)).latent_dist.mode() * vae.config.scaling_factor
    ids = parts["tokenizer"](["", "a red bench"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states, x = text(ids).last_hidden_state, torch.randn(1, 4, 16, 24, generator=seeded())
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        both = torch.cat([x, small], dim=1).repeat(2, 1, 1, 1)
        without, said = unet(both, t, states, class_labels=torch.tensor([20, 20])).sample.chunk(2)
        x = scheduler.step(without + 3.0 * (said - without), t, x).prev_sample
    assert_matches(latents[-1], x, 1e-3)
    assert ours.image.size == ours.depth.size == (48, 32)
    shares = VaeImageProcessorLDM3D.depth_pil_to_numpy(Image.open(files["depth_img"]).resize((24, 16)))[0]
    np.testing.assert_allclose(read_shares(files["depth_img"]), shares, atol=1e-6)
