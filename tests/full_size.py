"""Full-size Stable Diffusion v1 through this project and through `diffusers`: the same weights, the same numbers.

    PYTHONPATH=tests/contracts/goldens python tests/full_size.py --folder /tmp/full-size

writes a checkpoint in the original layout (4.3 GB, weights by the rule of the contract, none of them zero), reads it by
each project's own loader, and prints how far apart they are: each network, whole pictures, and a UNet in bfloat16.
It takes a quarter of an hour on two cores, 8 GB of memory, and removes the checkpoint. pytest does not collect it.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import diffusers
import fill
import torch
import transformers
from support import manifest
from torch import Tensor, nn

from ldm.config import load_config, model_section
from ldm.generation.geometry import geometry
from ldm.generation.noise import Noise
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import Request
from ldm.memory import place
from ldm.models.load import load_model

CONFIG = Path(__file__).resolve().parents[1] / "configs/stable-diffusion/v1-inference.yaml"
PROMPT = "a photograph of an astronaut riding a horse"
TEXT = "cond_stage_model.transformer.text_model."
SIDE, STEPS, SCALE, SEED = 256, 10, 7.5, 42

# CompVis' steps are 1, 101 ... 901, and its last move ends at step 0 instead of at the clean latent.
COMPVIS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
           "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}  # fmt: skip
SCHEDULERS = {
    "plms": diffusers.PNDMScheduler(**COMPVIS, skip_prk_steps=True),
    "ddim": diffusers.DDIMScheduler(**COMPVIS, clip_sample=False),
}


def write_checkpoint(path: Path) -> None:
    """All the weights of the published layout; each loader computes the noise schedule by itself."""
    arrays = fill.fill_arrays({key: shape for key, (shape, _) in manifest("sd-v1").items()}, salt=1)
    torch.save({"state_dict": {key: torch.from_numpy(array) for key, array in arrays.items()}}, path)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def inputs() -> dict[str, Tensor]:
    """A noisy latent at two timesteps, a condition, a latent to decode and a picture to encode, all Gaussian."""
    draw = seeded()
    return {
        "x": torch.randn(2, 4, 64, 64, generator=draw),
        "t": torch.tensor([981, 21]),
        "context": torch.randn(2, 77, 768, generator=draw),
        "z": 0.18215 * torch.randn(1, 4, 64, 64, generator=draw),
        "image": torch.randn(1, 3, 256, 256, generator=draw).tanh(),
    }


def load_ours(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return place(load_model(CONFIG, path, dtype=dtype), torch.device("cpu"))


def our_unet(model: nn.Module) -> Callable[[], Tensor]:
    """One call of the UNet; it gives float32 whatever it computes in."""
    given = inputs()
    return lambda: model.model.diffusion_model(given["x"], given["t"], context=given["context"])


def ours(path: Path) -> dict[str, Tensor]:
    """What this project makes of the inputs, by name."""
    model, given = load_ours(path), inputs()
    made = {
        "ids": model.cond_stage_model.tokenize([PROMPT, ""]),
        "text states": model.get_learned_conditioning([PROMPT, ""]),
        "unet, 64x64 latents": our_unet(model)(),
        "posterior, 256x256 pixels": model.encode_first_stage(given["image"]).parameters,
        "decoded, 512x512 pixels": model.decode_first_stage(given["z"]),
    }
    pipeline = Pipeline(model, geometry(model_section(load_config(CONFIG))))
    for sampler in SCHEDULERS:
        request = Request(PROMPT, sampler=sampler, steps=STEPS, scale=SCALE, width=SIDE, height=SIDE)
        latents = []
        pipeline.generate([request], Noise([seeded()]), lambda x, *_, to=latents: to.append(x.clone()))
        made[f"latents, {sampler}"] = latents[-1]
        made[f"picture, {sampler}"] = model.decode_first_stage(latents[-1])
    return made


def load_theirs(path: Path) -> dict[str, nn.Module]:
    """The three networks by diffusers' single-file loader, the text encoder by a cut of its prefix."""
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)).eval()  # fmt: skip
    state = torch.load(path, mmap=True)["state_dict"]
    names = [key for key in state if key.startswith(TEXT) and not key.endswith("position_ids")]
    text.load_state_dict({key.removeprefix(TEXT): state[key] for key in names})
    return {
        "text_encoder": text,
        "unet": diffusers.UNet2DConditionModel.from_single_file(state, original_config=str(CONFIG)),
        "vae": diffusers.AutoencoderKL.from_single_file(state, original_config=str(CONFIG)),
    }


def their_unet(unet: nn.Module) -> Callable[[], Tensor]:
    given = {name: tensor.to(unet.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs().items()}
    return lambda: unet(given["x"], given["t"], encoder_hidden_states=given["context"]).sample.float()


def theirs(path: Path, ids: Tensor) -> dict[str, Tensor]:
    """What diffusers makes of the same inputs. ids: the tokens (2, 77) of the prompt and of the empty one."""
    parts, given = load_theirs(path), inputs()
    vae, states = parts["vae"], parts["text_encoder"](ids).last_hidden_state
    scale = vae.config.scaling_factor
    made = {
        "text states": states,
        "unet, 64x64 latents": their_unet(parts["unet"])(),
        "posterior, 256x256 pixels": vae.encode(given["image"]).latent_dist.parameters,
        "decoded, 512x512 pixels": vae.decode(given["z"] / scale).sample,
    }
    for sampler, scheduler in SCHEDULERS.items():
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, tokenizer=None, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)  # fmt: skip
        latents = pipeline(
            prompt_embeds=states[:1], negative_prompt_embeds=states[1:], num_inference_steps=STEPS, width=SIDE,
            height=SIDE, guidance_scale=SCALE, generator=seeded(), output_type="latent").images  # fmt: skip
        made[f"latents, {sampler}"] = latents
        made[f"picture, {sampler}"] = vae.decode(latents / scale).sample
    return made


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written and removed again")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, and use the one that is")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "full-size-v1.ckpt"
    try:
        if not (options.keep and path.exists()):
            write_checkpoint(path)
        got = ours(path)
        gc.collect()
        want = theirs(path, got.pop("ids"))
        gc.collect()
        half = our_unet(load_ours(path, torch.bfloat16))()
    finally:
        if not options.keep:
            path.unlink(missing_ok=True)
    print(f"{'':28}{'max|a - b| / max|b|':>20}{'max|b|':>12}")
    for name, tensor in want.items():
        print(f"{name:28}{error(got[name], tensor):20.1e}{float(tensor.abs().max()):12.3g}")
    unet = want["unet, 64x64 latents"]
    print(f"{'unet in bfloat16':28}{error(half, unet):20.1e}{float(unet.abs().max()):12.3g}")


if __name__ == "__main__":
    main()
