"""Image variations and Stable unCLIP on the same weights as in diffusers, read from the folders that it saves."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import GOLDENS, assert_matches

from ldm.config import load_config, model_section
from ldm.generation.geometry import geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

D = 24  # of the space that the towers share
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
         "clip_sample": False, "set_alpha_to_one": False}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
          "image_size": 32, "patch_size": 8, "projection_dim": D}


def parts(context: int, prediction: str, **unet) -> dict:
    """A tiny UNet, autoencoder and picture tower with random weights, and a scheduler of the same steps as ours."""
    torch.manual_seed(0)
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=context,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **unet).eval(),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16).eval(),
        "image_encoder": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)).eval(),
        "feature_extractor": transformers.CLIPImageProcessor(),
        "scheduler": diffusers.DDIMScheduler(**BETAS, prediction_type=prediction),
    }


def ours(folder: Path) -> Pipeline:
    config = load_config(folder)
    return Pipeline(load_model(config, folder), geometry(model_section(config)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of 50x40 pixels, which is no size that is drawn."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def seen(encoder, path: str) -> torch.Tensor:
    """The picture as the tower is given it: how it is resized there is CompVis' way, not that of diffusers."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    return encoder.preprocess(pixels)


def drawn(pipeline: Pipeline, request: Request) -> torch.Tensor:
    latents = []
    pipeline.generate([request], Noise([seeded()]), lambda x, *_: latents.append(x.clone()))
    return latents[-1]


@torch.no_grad()
def test_image_variations_are_those_of_diffusers(tmp_path, photo):
    run = diffusers.StableDiffusionImageVariationPipeline(
        **parts(D, "epsilon"), safety_checker=None, requires_safety_checker=False)
    run.save_pretrained(tmp_path / "folder")
    run.set_progress_bar_config(disable=True)
    mine = ours(tmp_path / "folder")
    request = Request(init_img=photo, varies=True, sampler="ddim", steps=5, scale=3.0)
    pixels = seen(mine.model.cond_stage_model, photo)
    theirs = run(pixels, guidance_scale=3.0, num_inference_steps=5, generator=seeded(), output_type="latent").images
    assert_matches(drawn(mine, request), theirs, 1e-3)
    decoded = run.vae.decode(theirs / run.vae.config.scaling_factor).sample
    assert_matches(mine.model.decode_first_stage(theirs), decoded)


@torch.no_grad()
def test_stable_unclip_is_that_of_diffusers(tmp_path, photo):
    clip = GOLDENS / "tiny-clip"
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(clip)).eval()
    normalizer = diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer.StableUnCLIPImageNormalizer(D)
    normalizer.load_state_dict({"mean": torch.randn(1, D) / 9, "std": torch.rand(1, D) + 0.5})
    run = diffusers.StableUnCLIPImg2ImgPipeline(
        **parts(64, "v_prediction", class_embed_type="projection", projection_class_embeddings_input_dim=2 * D),
        text_encoder=text, tokenizer=transformers.CLIPTokenizer.from_pretrained(clip), image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    run.save_pretrained(tmp_path / "folder")
    run.set_progress_bar_config(disable=True)
    mine = ours(tmp_path / "folder")
    request = Request("a red bench", "grey", init_img=photo, varies=True, noise_level=600, sampler="ddim", steps=5,
                      scale=4.0)
    theirs = run(seen(mine.model.embedder, photo), request.prompt, negative_prompt=request.negative_prompt,
                 guidance_scale=4.0, num_inference_steps=5, noise_level=600, generator=seeded(),
                 output_type="latent").images
    assert_matches(drawn(mine, request), theirs, 1e-3)
