"""The folder that the scripts run, from what training left: weights in half precision, config and tokenizer."""

import shutil
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint import read_checkpoint
from ldm.checkpoint.names import COMPUTED, TRAINING_ONLY
from ldm.config import load_config
from ldm.modules.encoders.files import REPOSITORY

# What a config says of training alone, at the top of its params and in those of its first stage.
TRAINING_PARAMS = ("ckpt_path", "ignore_keys", "min_snr_gamma", "monitor", "offset_noise", "optimizer_config",
                   "reset_ema", "sample_posterior", "scheduler_config", "timestep_density", "trained_guidance",
                   "ucg_training", "use_ema", "windows")

# What reads a prompt as the model does, for a warning where it cannot be read.
GRAMMAR = {"target": "ldm.data.shapes.parse"}


def assemble(logs: Path, out: Path) -> None:
    """Write model.safetensors, config.yaml and clip/ into `out` from the log folder of a CachedLatentDiffusion.

    The averaged weights of the denoiser are taken. clip/ is the cond stage's folder, both towers, in half precision;
    the config names it by its path in the repository, or elsewhere as the folder beside it.
    """
    config = load_config(max((logs / "configs").glob("*-project.yaml")))
    model = OmegaConf.to_container(config.model, resolve=True)
    params, first_stage = model["params"], model["params"]["first_stage_config"]["params"]
    clip, kept = Path(params["cond_stage_config"]["params"]["version"]), out / "clip"
    for name in TRAINING_PARAMS:
        params.pop(name, None)
        first_stage.pop(name, None)
    params["use_ema"] = False
    params["cond_stage_config"]["params"]["version"] = path_in_config(kept)
    model["target"] = "ldm.models.diffusion.ddpm.LatentDiffusion"

    kept.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": model, "prompt_grammar": GRAMMAR}), out / "config.yaml")
    trained = read_checkpoint(logs / "checkpoints" / "last.ckpt", use_ema=True)
    weights = {name: weight for name, weight in trained.items()
               if not COMPUTED.fullmatch(name) and not TRAINING_ONLY.fullmatch(name)}
    save_file(halved(weights), out / "model.safetensors")
    save_file(halved(load_file(clip / "model.safetensors")), kept / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(clip / name, kept / name)


def path_in_config(folder: Path) -> str:
    """How a config that lies beside `folder` names it."""
    whole = folder.resolve()
    return whole.relative_to(REPOSITORY).as_posix() if whole.is_relative_to(REPOSITORY) else folder.name


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in half precision, single numbers and integers as they are."""
    return {name: weight.to(torch.float16 if weight.is_floating_point() and weight.ndim else weight.dtype).contiguous()
            for name, weight in weights.items()}
