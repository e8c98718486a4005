"""The same weights through this project and through `diffusers` give the same numbers: each network, then pictures.

diffusers reads the same checkpoint and YAML with its own loader, so the names of the weights are held against it too.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import GOLDENS, assert_matches, golden
from tiny import write_model

from ldm.config import load_config, model_section
from ldm.generation.geometry import geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.memory import place
from ldm.models.load import load_model

pytestmark = [
    # Schedulers hand tensors to NumPy in ways that it is about to leave behind.
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    # Pipelines ask for a steps_offset of 1 also where the spacing of steps makes no use of it.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

PROMPTS = ["a red bench", "two cats, on a hill"]
NEGATIVES = ["grey", "a tree"]
SHAPE = (2, 4, 16, 16)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# The largest difference of decoded pixels, which are about -1 to 1. Rounding alone makes 1e-5; the v model, whose
# answers change fast with its input, enlarges it twenty times.
TOLERANCE = {"text": 1e-4, "v": 1e-3, "inpaint": 1e-4, "edit": 1e-4}


class Ours:
    """A tiny model, loaded as the scripts do, and a pipeline with another copy of it, placed as the scripts do.

    Networks are compared before they are placed in channels_last, since torch normalises groups of that layout by the
    mean of squares, which for the small picture leaves only three digits.
    """

    def __init__(self, checkpoint: Path):
        config = checkpoint.with_name("config.yaml")
        self.model = load_model(config, checkpoint)
        placed = place(load_model(config, checkpoint), torch.device("cpu"))
        self.pipeline = Pipeline(placed, geometry(model_section(load_config(config))))

    def draw(self, noise=None, **settings) -> tuple[torch.Tensor, list[Image.Image]]:
        """The last latents (b, c, h, w) and the pictures of PROMPTS."""
        batch = [Request(prompt, negative, **settings) for prompt, negative in zip(PROMPTS, NEGATIVES)]
        latents = []
        drawn = self.pipeline.generate(batch, noise or Noise([seeded()]), lambda x, *_: latents.append(x.clone()))
        return latents[-1], [picture.image for picture in drawn]


class Theirs:
    """The same files in diffusers; the text encoder and the tokenizer are those of transformers."""

    def __init__(self, checkpoint: Path):
        config, clip = str(checkpoint.with_name("config.yaml")), GOLDENS / "tiny-clip"
        state = torch.load(checkpoint)["state_dict"]
        self.unet = diffusers.UNet2DConditionModel.from_single_file(state, original_config=config)
        self.vae = diffusers.AutoencoderKL.from_single_file(state, original_config=config)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
        self.text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(clip)).eval()
        prefix = "cond_stage_model.transformer.text_model."
        self.text_encoder.load_state_dict({
            key.removeprefix(prefix): weight for key, weight in state.items()
            if key.startswith(prefix) and not key.endswith("position_ids")
        })

    @torch.no_grad()
    def draw(self, scheduler, scale: float, pipeline: str = "", start: float | None = 1.0, **settings) -> torch.Tensor:
        """The last latents of PROMPTS by StableDiffusion<pipeline>Pipeline, from the noise of `Ours.draw`.

        start: what the first noise is multiplied by; None leaves it to the pipeline to draw it.
        """
        generator = seeded()
        if start is not None:
            settings["latents"] = start * torch.randn(SHAPE, generator=generator)
        parts = vars(self) | {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
        run = getattr(diffusers, f"StableDiffusion{pipeline}Pipeline")(**parts, requires_safety_checker=False)
        run.set_progress_bar_config(disable=True)
        asked = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "guidance_scale": scale, "output_type": "latent"}
        return run(**asked, generator=generator, **settings).images

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """The scaled mean of the posterior, where diffusers' pipelines would draw from it."""
        return self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent / self.vae.config.scaling_factor).sample


class OneNoise:
    """The same noise each time that some is asked for."""

    def __init__(self):
        self.noise = torch.randn(SHAPE, generator=seeded())

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        return self.noise

    start = __call__


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, theirs) of a kind of tiny model, from the same files."""

    @cache
    def load(kind: str) -> tuple[Ours, Theirs]:
        checkpoint = write_model(tmp_path_factory.mktemp(kind), kind)
        return Ours(checkpoint), Theirs(checkpoint)

    return load


@pytest.fixture
def sketch(tmp_path):
    """A picture and a mask of its right half as files, and as tensors (1, 3, h, w) in [-1, 1], (1, 1, h, w)."""
    row = np.linspace(0, 255, 64)
    pixels = np.stack(np.broadcast_arrays(row[:, None], row[None], 255 - row[:, None] / 2), axis=-1).astype(np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    files = {"init_img": str(tmp_path / "sketch.png"), "mask": str(tmp_path / "mask.png")}
    Image.fromarray(pixels).save(files["init_img"])
    Image.fromarray(mask).save(files["mask"])
    return files, torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1, torch.tensor(mask)[None, None] / 255


def assert_same_pictures(
    ours: Ours, theirs: Theirs, drawn: tuple, latents: torch.Tensor, tolerance: float, left: int = 0
) -> None:
    """Hold decoded latents against each other, and our 8-bit pictures, from column `left`, against unrounded pixels."""
    want = theirs.decode(latents)
    error = (ours.pipeline.model.decode_first_stage(drawn[0]) - want).abs().max()
    assert error <= tolerance, f"the decoded pixels differ by {error:.1e}"
    levels = ((want.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(drawn[1]) - levels)[:, :, left:].max() <= 1 + 127.5 * tolerance


# The small inputs are a thousandth of the others: they tell apart normalisations of another eps.
@pytest.mark.parametrize("kind", ["text", "v", "inpaint"])
@pytest.mark.parametrize("name, t", [("x_T", 0), ("x_T", 500), ("x_T", 999), ("x_small", 10)])
def test_the_unet_gives_the_same_output(both, kind, name, t):
    ours, theirs = both(kind)
    x, context, t = golden("inputs")[name], golden("inputs")["c"], torch.full((2,), t)
    if kind == "inpaint":
        x = torch.cat([x, golden("inputs")["c_concat"]], dim=1)
    with torch.no_grad():
        got = ours.model.model.diffusion_model(x, t, context=context)
        assert_matches(got, theirs.unet(x, t, encoder_hidden_states=context).sample)


@pytest.mark.parametrize("name", ["image", "image_small"])
def test_the_autoencoder_gives_the_same_posterior_and_the_same_pixels(both, name):
    ours, theirs = both("text")
    image, z = golden("inputs")[name], golden("inputs")["z"]
    posterior = ours.model.encode_first_stage(image)
    with torch.no_grad():
        assert_matches(posterior.parameters, theirs.vae.encode(image).latent_dist.parameters)
    assert_matches(ours.model.decode_first_stage(z), theirs.decode(z))


def test_prompts_become_the_same_states(both):
    ours, theirs = both("text")
    prompts = [*PROMPTS, "", "Ein Hügel; 2 chats, 'the' 7th" * 9]
    ids = theirs.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        want = theirs.text_encoder(ids["input_ids"]).last_hidden_state
    assert_matches(ours.model.get_learned_conditioning(prompts), want)


class WithInnerStepsOfHeun(diffusers.DPMSolverSinglestepScheduler):
    """CompVis computes the second evaluation of a third-order step as diffusers' solver_type heun does, the third, and
    the second-order steps, as its midpoint."""

    def singlestep_dpm_solver_update(self, *args, order: int, **kwargs):
        inner = order == 2 and 3 in self.order_list[self.step_index + 1:][:1]
        self.register_to_config(solver_type="heun" if inner else "midpoint")
        return super().singlestep_dpm_solver_update(*args, order=order, **kwargs)


class FromOneLevelAbove(diffusers.DDIMScheduler):
    """Noises a picture to one level above the first step, as CompVis does; diffusers noises it to that level itself."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return super().add_noise(latents, noise, timesteps + len(self) // self.num_inference_steps)


@dataclass(frozen=True)
class Method:
    """One of our samplers and the scheduler that does the same: what each is asked for.

    start: what diffusers' first noise must be multiplied by; timesteps: the steps where no setting makes them so.
    """

    sampler: str
    scheduler: type
    told: dict[str, Any]
    steps: int = 10
    asked: dict[str, Any] = field(default_factory=dict)
    start: float = 1.0
    timesteps: list[int] | None = None

    def draw(self, ours: Ours, theirs: Theirs, kind: str, scale: float) -> tuple[tuple, torch.Tensor]:
        """Our last latents and pictures, and their last latents."""
        prediction = "v_prediction" if kind == "v" else "epsilon"
        scheduler = self.scheduler(**BETAS, **self.told, prediction_type=prediction)
        spacing = {"timesteps": self.timesteps} if self.timesteps else {"num_inference_steps": self.steps}
        size = {"height": 64, "width": 64}
        eta = self.asked.get("eta", 0.0)
        latents = theirs.draw(scheduler, scale, start=self.start, eta=eta, **spacing, **size)
        return ours.draw(sampler=self.sampler, steps=self.steps, scale=scale, **self.asked), latents


# CompVis' steps are 1, 101 ... 901, and its last move ends at step 0 instead of at the clean latent.
COMPVIS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
# k-diffusion's steps go evenly from 999 to 0, which ten of them hit without a fraction, and end at the clean latent.
EVEN = {"timestep_spacing": "linspace"}
# DPM-Solver's first nine of ten such steps, the last move ending at step 0.
SOLVER = {"final_sigmas_type": "sigma_min"}
TRAILING = {"timestep_spacing": "trailing"}
# k-diffusion begins with sigma * noise, diffusers' DPM-Solver with the noise itself.
SIGMA = float(1 - (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.double) ** 2).prod()) ** 0.5
K_DIFFUSION = {"start": SIGMA, "timesteps": list(range(999, -1, -111))}
# diffusers takes lower orders at the end of short walks unless told not to, k-diffusion never.
FULL_ORDER = {"lower_order_final": False}

METHODS = {
    "plms": Method("plms", diffusers.PNDMScheduler, COMPVIS | {"skip_prk_steps": True}, 20),
    "ddim": Method("ddim", diffusers.DDIMScheduler, COMPVIS | {"clip_sample": False}),
    "ddim with eta": Method("ddim", diffusers.DDIMScheduler, COMPVIS | {"clip_sample": False}, asked={"eta": 0.7}),
    "ddim trailing": Method(
        "ddim", diffusers.DDIMScheduler, TRAILING | {"clip_sample": False}, asked={"schedule": "trailing"}),
    "ddpm": Method("ddpm", diffusers.DDPMScheduler, {"steps_offset": 1, "clip_sample": False}),
    "euler": Method("euler", diffusers.EulerDiscreteScheduler, EVEN),
    "euler trailing": Method("euler", diffusers.EulerDiscreteScheduler, TRAILING, asked={"schedule": "trailing"}),
    "euler karras": Method(
        "euler", diffusers.EulerDiscreteScheduler, EVEN | {"use_karras_sigmas": True}, asked={"schedule": "karras"}),
    "euler exponential": Method(
        "euler", diffusers.EulerDiscreteScheduler, EVEN | {"use_exponential_sigmas": True},
        asked={"schedule": "exponential"}),
    "euler_a": Method("euler_a", diffusers.EulerAncestralDiscreteScheduler, EVEN),
    "heun": Method("heun", diffusers.HeunDiscreteScheduler, EVEN),
    "lms": Method("lms", diffusers.LMSDiscreteScheduler, EVEN),
    "dpm2": Method("dpm2", diffusers.KDPM2DiscreteScheduler, EVEN),
    "dpm2_a": Method("dpm2_a", diffusers.KDPM2AncestralDiscreteScheduler, EVEN),
    "dpmpp_2m": Method("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, FULL_ORDER, **K_DIFFUSION),
    "dpmpp_2m trailing": Method(
        "dpmpp_2m", diffusers.DPMSolverMultistepScheduler, TRAILING | FULL_ORDER, asked={"schedule": "trailing"},
        start=SIGMA),
    "dpmpp_2m_sde": Method(
        "dpmpp_2m_sde", diffusers.DPMSolverMultistepScheduler, FULL_ORDER | {"algorithm_type": "sde-dpmsolver++"},
        **K_DIFFUSION),
    "dpm_solver": Method("dpm_solver", diffusers.DPMSolverMultistepScheduler, SOLVER, 9),
    "dpm_solver, order 3": Method(
        "dpm_solver", diffusers.DPMSolverMultistepScheduler, SOLVER | {"solver_order": 3}, 9, {"solver_order": 3}),
    "dpm_solver, singlestep": Method(
        "dpm_solver", diffusers.DPMSolverSinglestepScheduler, SOLVER | {"lower_order_final": True}, 9,
        {"solver_method": "singlestep"}),
    "dpm_solver, singlestep, order 3": Method(
        "dpm_solver", WithInnerStepsOfHeun, SOLVER | {"lower_order_final": True, "solver_order": 3}, 9,
        {"solver_method": "singlestep", "solver_order": 3}),
    "unipc": Method("unipc", diffusers.UniPCMultistepScheduler, SOLVER, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_sampler_draws_the_picture_of_its_scheduler(both, name):
    ours, theirs = both("text")
    drawn, latents = METHODS[name].draw(ours, theirs, "text", scale=7.5)
    assert_same_pictures(ours, theirs, drawn, latents, TOLERANCE["text"])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m", "dpm_solver", "unipc"])
def test_a_model_that_predicts_v_draws_the_same_picture(both, name):
    # PNDM is left out: diffusers averages v of several steps, where we average eps.
    ours, theirs = both("v")
    drawn, latents = METHODS[name].draw(ours, theirs, "v", scale=3.0)
    assert_same_pictures(ours, theirs, drawn, latents, TOLERANCE["v"])


@pytest.mark.parametrize("sampler, scheduler", [
    ("ddim", FromOneLevelAbove(**BETAS, **COMPVIS, clip_sample=False)),
    ("euler", diffusers.EulerDiscreteScheduler(**BETAS, **EVEN)),
])  # fmt: skip
def test_image_to_image_draws_the_same_picture(both, sketch, sampler, scheduler):
    ours, theirs = both("text")
    files, image, _ = sketch
    drawn = ours.draw(sampler=sampler, steps=10, scale=7.5, strength=0.5, init_img=files["init_img"])
    given = theirs.encode(image).expand(SHAPE)
    latents = theirs.draw(
        scheduler, 7.5, "Img2Img", start=None, image=given, strength=0.5, num_inference_steps=10)
    assert_same_pictures(ours, theirs, drawn, latents, TOLERANCE["text"])


def test_inpainting_by_nine_channels_draws_the_same_picture(both, sketch):
    ours, theirs = both("inpaint")
    files, image, mask = sketch
    drawn = ours.draw(sampler="ddim", steps=10, scale=7.5, **files)
    latents = theirs.draw(
        diffusers.DDIMScheduler(**BETAS, **COMPVIS, clip_sample=False), 7.5, "Inpaint",
        image=(image + 1) / 2, mask_image=mask, masked_image_latents=theirs.encode(image * (mask < 0.5)), strength=1.0,
        num_inference_steps=10, height=64, width=64)  # fmt: skip
    assert_same_pictures(ours, theirs, drawn, latents, TOLERANCE["inpaint"], left=32)


def test_inpainting_by_blending_draws_the_same_latents(both, sketch):
    # diffusers blends with one noise, we, as CompVis, draw anew; our last blend is that of the pixels.
    ours, theirs = both("text")
    files, image, mask = sketch
    drawn = ours.draw(OneNoise(), sampler="euler", steps=10, scale=7.5, strength=0.6, **files)
    latents = theirs.draw(
        diffusers.EulerDiscreteScheduler(**BETAS, **EVEN), 7.5, "Inpaint", start=None,
        image=theirs.encode(image), mask_image=mask, masked_image_latents=torch.zeros(1, *SHAPE[1:]), strength=0.6,
        num_inference_steps=10, height=64, width=64)  # fmt: skip
    assert_matches(drawn[0][..., 8:], latents[..., 8:])


@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_an_edit_draws_the_same_picture(both, sketch, name):
    ours, theirs = both("edit")
    files, image, _ = sketch
    method = METHODS[name]
    drawn = ours.draw(sampler=name, steps=10, scale=5.0, image_scale=1.5, init_img=files["init_img"])
    latents = theirs.draw(
        method.scheduler(**BETAS, **method.told), 5.0, "InstructPix2Pix", image=((image + 1) / 2).expand(2, -1, -1, -1),
        image_guidance_scale=1.5, num_inference_steps=10)
    assert_same_pictures(ours, theirs, drawn, latents, TOLERANCE["edit"])


# The weight of eq. 6 jumps at the threshold, where rounding would decide: with these it does not.
@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.parametrize("name, strength", [("ddim", "30,3,0,0.3,0.4"), ("heun", "30,2,9,0.5,0.7")])
def test_keeping_away_from_a_concept_draws_the_same_picture(both, name, strength):
    ours, theirs = both("text")
    method, generator = METHODS[name], seeded()
    drawn = ours.draw(sampler=name, steps=10, scale=7.5, safe=strength)
    keys = ("guidance_scale", "warmup_steps", "threshold", "momentum_scale", "mom_beta")
    settings = {f"sld_{key}": float(number) for key, number in zip(keys, strength.split(","))}
    parts = vars(theirs) | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    run = diffusers.StableDiffusionPipelineSafe(scheduler=method.scheduler(**BETAS, **method.told), **parts)
    run.set_progress_bar_config(disable=True)
    latents = []
    run(PROMPTS, negative_prompt=NEGATIVES, latents=torch.randn(SHAPE, generator=generator), generator=generator,
        height=64, width=64, num_inference_steps=10, output_type="np", **settings,
        callback=lambda step, t, x: latents.append(x))
    plain = ours.draw(sampler=name, steps=10, scale=7.5)
    assert (drawn[0] - plain[0]).abs().max() > 0.1
    assert_same_pictures(ours, theirs, drawn, latents[-1], TOLERANCE["text"])
