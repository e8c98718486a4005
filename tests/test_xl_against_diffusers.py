"""Stable Diffusion XL and its refiner draw what diffusers draws with the same weights, read from its own folders."""

from pathlib import Path

import diffusers
import fill
import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint import open_checkpoint
from ldm.checkpoint.folder_config import to_yaml
from ldm.config import load_config, model_section
from ldm.errors import RequestError
from ldm.generation.geometry import Geometry, geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.models.load import load_model
from ldm.modules.encoders.tokenizer import END, write_clip_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning"),
]

PROMPTS, NEGATIVES = ["a red bench", "two cats, on a hill"], ["grey", "a tree"]
STEPS, SCALE = 5, 5.0
SHAPE = (2, 4, 8, 8)
GEOMETRY = Geometry(channels=4, factor=8, side=64, step=16)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "vocab_size": 49408, "projection_dim": 32, "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def write_folder(folder: Path, refiner: bool) -> diffusers.DiffusionPipeline:
    """A tiny pipeline of diffusers with weights of scale, also as a folder."""
    words = {}
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!"))[refiner:]:
        write_clip_tokenizer(folder / name, pad)
        words[name] = transformers.CLIPTokenizer.from_pretrained(folder / name)
    numbers = 5 if refiner else 6
    parts = {
        "text_encoder_2": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**TEXT, hidden_act="gelu")),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32 if refiner else 64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=32 + 8 * numbers),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, sample_size=64,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, scaling_factor=0.13025),
    }  # fmt: skip
    if not refiner:
        parts["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    for salt, part in enumerate(parts.values(), 10 * refiner):
        fill.fill_module(part.eval(), salt)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace")
    kind, told = diffusers.StableDiffusionXLPipeline, {}
    if refiner:
        kind = diffusers.StableDiffusionXLImg2ImgPipeline
        told = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        words["tokenizer"] = parts["text_encoder"] = None
    made = kind(**parts, **words, scheduler=scheduler, add_watermarker=False, **told)
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{refiner: (the folder, the pipeline of diffusers that it was written from)}."""
    made = {}
    for refiner in (False, True):
        folder = tmp_path_factory.mktemp("refiner" if refiner else "base")
        made[refiner] = folder, write_folder(folder, refiner)
    return made


@pytest.fixture(scope="module")
def models(folders):
    """{refiner: the model in its folder as we read it}."""
    return {refiner: load_model(folder, folder) for refiner, (folder, _) in folders.items()}


def ours(models, *which: bool, negatives=NEGATIVES, sampler="euler", **settings) -> torch.Tensor:
    """The last latents of PROMPTS by one of the models, or by two of which the second refines."""
    first, *refiner = (models[one] for one in which)
    pipeline = Pipeline(first, GEOMETRY, "full", *refiner)
    batch = [Request(prompt, negative, sampler=sampler, steps=STEPS, scale=SCALE, **settings)
             for prompt, negative in zip(PROMPTS, negatives)]  # fmt: skip
    for request in batch:
        pipeline.check(request)
    latents = []
    pipeline.generate(batch, Noise([seeded()]), lambda x, *_: latents.append(x.clone()))
    return latents[-1]


def theirs(pipeline, **settings) -> torch.Tensor:
    """The last latents of PROMPTS by diffusers."""
    if isinstance(pipeline, diffusers.StableDiffusionXLPipeline):
        noise = torch.randn(SHAPE, generator=seeded())
        settings = {"height": 64, "width": 64, "latents": noise, **settings}
    return pipeline(PROMPTS, guidance_scale=SCALE, num_inference_steps=STEPS, output_type="latent", **settings).images


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def assert_same_picture(model, got: torch.Tensor, want: torch.Tensor) -> None:
    difference = (model.decode_first_stage(got) - model.decode_first_stage(want)).abs().max()
    assert difference <= 1e-4, f"the decoded pixels differ by {difference:.1e}"


MEASURES = {
    "": ({}, {}),
    "sizes": ({"original_size": "512x384", "crop": "16,8", "target_size": "96x128"},
              {"original_size": (384, 512), "crops_coords_top_left": (16, 8), "target_size": (128, 96)}),
}  # fmt: skip


@pytest.mark.parametrize("case", MEASURES)
def test_the_base_draws_the_same_picture(folders, models, case):
    asked, told = MEASURES[case]
    got = ours(models, False, **asked)
    assert_same_picture(models[False], got, theirs(folders[False][1], negative_prompt=NEGATIVES, **told))
    if asked:
        assert error(got, ours(models, False)) > 1e-2


def test_an_empty_negative_prompt_is_zeros_for_the_base(folders, models):
    got = ours(models, False, negatives=["", ""])
    assert_same_picture(models[False], got, theirs(folders[False][1]))
    assert error(got, ours(models, False, negatives=[" ", " "])) > 1e-3


@pytest.fixture
def sketch(tmp_path):
    """A picture as a file, and what diffusers takes for it: its latents (1, 4, 8, 8) by the mean of the posterior."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    image.save(tmp_path / "sketch.png")
    pixels = torch.tensor(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]
    return str(tmp_path / "sketch.png"), pixels / 127.5 - 1


@torch.no_grad()
def encoded(pipeline, pixels: torch.Tensor) -> torch.Tensor:
    latent = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    return latent.expand(SHAPE)


@pytest.mark.parametrize("score", [None, 3.0])
def test_the_refiner_draws_the_same_picture_from_a_picture(folders, models, sketch, score):
    file, pixels = sketch
    pipeline = folders[True][1]
    told = {} if score is None else {"aesthetic_score": score}
    got = ours(models, True, negatives=["", ""], init_img=file, strength=0.6, **told)
    want = theirs(pipeline, image=encoded(pipeline, pixels), strength=0.6, generator=seeded(), **told)
    assert_same_picture(models[True], got, want)


@pytest.mark.parametrize("share", [0.8, 0.3])
def test_base_and_refiner_meet_in_the_latent(folders, models, share):
    (_, base), (_, refiner) = folders[False], folders[True]
    handed = theirs(base, negative_prompt=NEGATIVES, denoising_end=share)
    want = theirs(refiner, negative_prompt=NEGATIVES, image=handed, denoising_start=share)
    got = ours(models, False, True, refine_from=share)
    assert_same_picture(models[False], got, want)
    assert error(got, ours(models, False)) > 1e-3


def test_a_refiner_that_begins_at_the_end_changes_nothing_and_one_from_the_start_draws_all(models):
    assert torch.equal(ours(models, False, True, refine_from=1.0), ours(models, False))
    assert torch.equal(ours(models, False, True, refine_from=0.0), ours(models, True))


def test_a_single_file_draws_what_the_folder_draws(folders, models, tmp_path):
    folder = folders[False][0]
    state = {name: weight.contiguous() for name, weight in open_checkpoint(folder).tensors.items()}
    spare = {"conditioner.embedders.0.logit_scale": torch.tensor(4.6)}  # which some programs write
    save_file(state | spare, tmp_path / "model.safetensors")
    OmegaConf.save(OmegaConf.create(to_yaml(folder)), tmp_path / "config.yaml")
    file = load_model(tmp_path / "config.yaml", tmp_path / "model.safetensors")
    assert torch.equal(ours({False: file}, False), ours(models, False))


def test_the_sizes_are_read_from_the_folder(folders):
    for folder, _ in folders.values():
        assert geometry(model_section(load_config(folder))) == GEOMETRY


@pytest.mark.parametrize("asked", ["aesthetic_score", "target_size"])
def test_what_a_model_is_not_told_is_refused_with_the_reason(models, asked):
    scored = asked == "aesthetic_score"
    request = Request("a fox", **{asked: 5.0 if scored else "64x64"})
    with pytest.raises(RequestError, match=f"not told of {asked}: leave --{asked} out"):
        Pipeline(models[not scored], GEOMETRY).check(request)
    Pipeline(models[False], GEOMETRY, "full", models[True]).check(request)
