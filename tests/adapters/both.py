"""One tiny model in this project and in diffusers, to put the same adapter file into both and compare what they say."""

from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from support import GOLDENS, assert_matches, golden
from tiny import write_model

from ldm.models.load import load_model

PROMPTS = ["a red bench", "two cats, on a hill"]


@cache
def checkpoint(folder: Path) -> Path:
    return write_model(folder / "model")


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    path = checkpoint(folder)
    return load_model(path.with_name("config.yaml"), path, dtype=dtype)


def theirs(folder: Path) -> diffusers.StableDiffusionPipeline:
    """The same weights, read by diffusers' own loader; text encoder and tokenizer are those of transformers."""
    path, clip = checkpoint(folder), GOLDENS / "tiny-clip"
    config, state = str(path.with_name("config.yaml")), torch.load(path)["state_dict"]
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(clip)).eval()
    prefix = "cond_stage_model.transformer.text_model."
    text_encoder.load_state_dict({
        key.removeprefix(prefix): weight for key, weight in state.items()
        if key.startswith(prefix) and not key.endswith("position_ids")
    })
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_single_file(state, original_config=config),
        unet=diffusers.UNet2DConditionModel.from_single_file(state, original_config=config),
        text_encoder=text_encoder, tokenizer=transformers.CLIPTokenizer.from_pretrained(clip),
        scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
       safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


@torch.no_grad()
def their_states(pipeline: diffusers.StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """What diffusers makes of prompts: (b, 77, c)."""
    return pipeline.encode_prompt(prompts, "cpu", 1, False)[0]


@torch.no_grad()
def assert_same(model: torch.nn.Module, pipeline: diffusers.StableDiffusionPipeline) -> None:
    """The text encoder and the UNet of both give the same numbers."""
    states, want = model.get_learned_conditioning(PROMPTS), their_states(pipeline, PROMPTS)
    assert_matches(states, want)
    x, t = golden("inputs")["x_T"], torch.tensor([301, 301])
    assert_matches(model.apply_model(x, t, want), pipeline.unet(x, t, want).sample)


@torch.no_grad()
def answer(model: torch.nn.Module) -> torch.Tensor:
    """A number of outputs of both networks of our model, as one vector."""
    states = model.get_learned_conditioning(PROMPTS)
    x, t = golden("inputs")["x_T"], torch.tensor([301, 301])
    return torch.cat([states.flatten(), model.apply_model(x, t, states).flatten()])
