"""The upscalers and diffusers' pipelines for them draw the same latents with the same weights, and how tiles differ."""

import diffusers
import numpy as np
import pytest
import torch
from folders import assert_reads_as, save_folder
from PIL import Image
from support import assert_matches
from test_against_diffusers import BETAS, COMPVIS, NEGATIVES, PROMPTS, Ours, Theirs, seeded
from tiny import write_model

from ldm.checkpoint.diffusers import place
from ldm.checkpoint.kunet import K_UNET
from ldm.config import load_config, model_section
from ldm.generation.geometry import geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.models.load import load_model
from ldm.sampling import tiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

X4_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def x4(tmp_path_factory):
    checkpoint = write_model(tmp_path_factory.mktemp("x4"), "x4")
    return Ours(checkpoint), Theirs(checkpoint)


@pytest.fixture(scope="module")
def x2(tmp_path_factory):
    """Our model, and the parts of diffusers' pipeline with its weights."""
    checkpoint = write_model(tmp_path_factory.mktemp("x2"), "x2")
    theirs = Theirs(write_model(tmp_path_factory.mktemp("v"), "v"))  # whose text encoder and autoencoder are the same
    state = torch.load(checkpoint)["state_dict"]
    prefix = "model.diffusion_model."
    weights = {place(key.removeprefix(prefix), K_UNET): weight
               for key, weight in state.items() if key.startswith(prefix)}  # fmt: skip
    theirs.unet = diffusers.UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=32, block_out_channels=[64, 128, 128], conv_in_kernel=1, conv_out_kernel=1,
        cross_attention_dim=64, down_block_types=["KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
        up_block_types=["KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"], in_channels=8, out_channels=5,
        layers_per_block=2, mid_block_type=None, norm_num_groups=None, resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=192, time_embedding_type="fourier", timestep_post_act="gelu")  # fmt: skip
    theirs.unet.load_state_dict(weights)
    return Ours(checkpoint), theirs


@pytest.fixture
def photo(tmp_path):
    """A small picture as a file, and as a tensor (1, 3, h, w) in [0, 1]: a gradient under blocks of noise."""
    noise = np.random.default_rng(3).integers(0, 128, (6, 10, 3)).repeat(4, 0).repeat(4, 1)
    pixels = (noise + np.linspace(0, 127, 40)[:, None]).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png"), torch.tensor(pixels).permute(2, 0, 1)[None] / 255


def test_the_x4_upscaler_draws_the_same_latents(x4, photo):
    ours, theirs = x4
    path, image = photo
    scheduler = diffusers.DDIMScheduler(**X4_BETAS, **COMPVIS, clip_sample=False, prediction_type="v_prediction")
    drawn, pictures = ours.draw(sampler="ddim", steps=5, scale=9.0, init_img=path, upscale=4, noise_level=50)
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        **vars(theirs), scheduler=scheduler, low_res_scheduler=diffusers.DDPMScheduler(**X4_BETAS))
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(PROMPTS, image.expand(2, -1, -1, -1), num_inference_steps=5, guidance_scale=9.0, noise_level=50,
                    negative_prompt=NEGATIVES, generator=seeded(), output_type="latent").images  # fmt: skip
    assert drawn.shape == (2, 4, 24, 40)
    assert_matches(drawn, want, 1e-3)
    assert [picture.size for picture in pictures] == [(160, 96)] * 2


@torch.no_grad()
def test_the_x2_upscaler_draws_the_same_latents(x2, photo):
    ours, theirs = x2
    path, image = photo
    drawn, pictures = ours.draw(sampler="euler", steps=5, scale=3.0, init_img=path, upscale=2)
    latent = theirs.encode(2 * image - 1).expand(2, -1, -1, -1)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", prediction_type="sample")
    pipeline = diffusers.StableDiffusionLatentUpscalePipeline(**vars(theirs), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(PROMPTS, latent, num_inference_steps=5, guidance_scale=3.0, negative_prompt=NEGATIVES,
                    generator=seeded(), output_type="latent").images  # fmt: skip
    assert_matches(drawn, want, 1e-3)
    assert [picture.size for picture in pictures] == [(80, 48)] * 2


@torch.no_grad()
def test_latents_are_enlarged_without_a_picture_between_as_by_both_pipelines(x2, tmp_path):
    ours, theirs = x2
    checkpoint = write_model(tmp_path, "text")
    config = checkpoint.with_name("config.yaml")
    base = load_model(config, checkpoint)
    sizes = geometry(model_section(load_config(config)))
    chain = Pipeline(base, sizes, upscaler=ours.pipeline)
    batch = [Request(prompt, sampler="euler", steps=3, width=32, height=48, upscale=2) for prompt in PROMPTS]
    latents, noise = [], Noise([seeded()])
    drawn = chain.generate(batch, noise, lambda x, *_: latents.append(x.clone()))
    assert [picture.image.size for picture in drawn] == [(64, 96)] * 2
    assert len(latents) == chain.moves(batch[0]) == 3 + 20
    generator = seeded()
    torch.randn(2, 4, 12, 8, generator=generator)  # what the first model began with
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", prediction_type="sample")
    pipeline = diffusers.StableDiffusionLatentUpscalePipeline(**vars(theirs), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(PROMPTS, latents[2], num_inference_steps=20, guidance_scale=1.0, generator=generator,
                    output_type="latent").images  # fmt: skip
    assert_matches(latents[-1], want, 1e-3)


def seams(model, side: int) -> tuple[float, float]:
    """How much a network's answer in tiles differs from that as a whole: at the tiles' edges, and elsewhere."""
    step = 4
    generator = torch.Generator().manual_seed(0)
    x, beside = torch.randn(2, 4, 16, 96, generator=generator), torch.rand(2, 3, 16, 96, generator=generator) * 2 - 1
    cond = {"c_concat": [beside], "c_crossattn": [model.get_learned_conditioning(PROMPTS)],
            "c_adm": torch.tensor([20, 20])}  # fmt: skip
    t = torch.tensor([500, 500])
    difference = tiles.tiled(model.apply_model, side, step)(x, t, cond) - model.apply_model(x, t, cond)
    begins = tiles.starts(96, side, step)
    edges = {begin + i for begin in begins[1:] for i in (-1, 0)} | {begin + side + i for begin in begins[:-1]
                                                                      for i in (-1, 0)}
    at_edges = torch.tensor([column in edges for column in range(96)])
    column = difference.abs().mean(dim=(0, 1, 2))
    return float(column[at_edges].mean()), float(column[~at_edges].mean())


@torch.no_grad()
def test_tiles_differ_from_the_whole_no_more_at_their_seams_than_elsewhere(x4, monkeypatch):
    model = x4[0].model
    at_seams, elsewhere = seams(model, 32)
    assert at_seams < 1.2 * elsewhere
    assert elsewhere < 0.06
    monkeypatch.setattr(tiles, "OVERLAP", 1000)
    assert seams(model, 32)[0] > 2.5 * at_seams


@pytest.mark.parametrize("kind", ["x4", "x2"])
def test_a_folder_of_diffusers_reads_as_the_same_model(request, kind, tmp_path):
    ours, theirs = request.getfixturevalue(kind)
    schedules = {"x4": {"low_res_scheduler": diffusers.DDPMScheduler(**X4_BETAS)}, "x2": {}}[kind]
    main = diffusers.EulerDiscreteScheduler(**{"x4": X4_BETAS, "x2": BETAS}[kind], prediction_type="v_prediction")
    save_folder(tmp_path, theirs, scheduler=main, **schedules)
    assert_reads_as(tmp_path, ours.model)
