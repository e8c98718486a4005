"""A checkpoint in another form: .ckpt, .safetensors, or a folder in the layout of the diffusers library.

Between files, and into a folder and back, nothing is lost: what has no place in a folder (the averaged weights, the
schedule, the last block of Stable Diffusion 2's text encoder) goes into one more file there, which only we read.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import Checkpoint, folder_config, open_checkpoint
from ldm.checkpoint.diffusers import CLIP, LAYOUTS, NAMES, REST, Names, open_clip_names, place, split
from ldm.checkpoint.folder_config import from_yaml, is_folder
from ldm.checkpoint.write import (
    Recipe,
    Recipes,
    outline,
    read_notes,
    select,
    unfinished,
    write_ckpt,
    write_safetensors,
)
from ldm.config import load_config, model_section
from ldm.errors import ConfigError, OutputError
from ldm.modules.encoders.tokenizer import END, tokenizer_folder, write_clip_tokenizer

logger = logging.getLogger(__name__)

FORMS = {".ckpt": write_ckpt, ".pt": write_ckpt, ".pth": write_ckpt, ".safetensors": write_safetensors}
FOLDER = LAYOUTS[-1]
WEIGHTS = {"text_encoder": "model.safetensors"}  # of the others, diffusion_pytorch_model.safetensors
# Of the text encoder: derived, or used by no Stable Diffusion model, and unknown to their class.
HOMELESS = re.compile(r".*position_ids|text_projection\..*")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

LOST = ("the schedule is left to the config, and of Stable Diffusion 2's text encoder the last block, text_projection "
        "and logit_scale, which it does not use, are zero")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    ema: bool | None = None,
    config: str | Path | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint in the form that the target's name tells (see `is_file`).

    dtype: of the weights, None for that of each. ema: True writes the averaged weights as the weights, False leaves
    them out. config: the YAML, which a folder needs. force: replace what is at the target. The target gets its name
    when it is whole. Raises CheckpointError, ConfigError, OutputError.
    """
    to_file, target = is_file(target), Path(target)
    checkpoint = open_checkpoint(source)
    recipes, notes = select(checkpoint, ema, dtype), read_notes(checkpoint)
    size = sum(shape.nbytes for shape in outline(checkpoint, recipes).values())
    if not to_file:
        if force and target.exists() and not is_folder(target):
            raise OutputError(f"{target} is not a model's folder, so it is not replaced: choose another name")
        if config is None:
            raise ConfigError("a folder is written with the model's YAML: name it with --config")
        section = OmegaConf.to_container(model_section(load_config(config), config), resolve=True)
    with unfinished(target, size, force) as path:
        if to_file:
            FORMS[target.suffix](path, checkpoint, recipes, notes)
        else:
            write_folder(path, checkpoint, recipes, notes, section)
    if checkpoint.path.is_dir() and not (checkpoint.path / REST).is_file():
        logger.warning("%s was not written here, so it has no more than what is run: %s", checkpoint.path, LOST)


def is_file(target: str | Path) -> bool:
    """Whether a target is a file by its ending; else it is a folder, whose name ends in / or has no dot.

    Raises OutputError for another ending.
    """
    path = Path(target)
    if path.suffix in FORMS:
        return True
    if path.suffix and not path.is_dir() and not str(target).endswith("/"):
        raise OutputError(f"{target} must end in {', '.join(FORMS)}, or in / for a folder")
    return False


def write_folder(
    path: Path, checkpoint: Checkpoint, recipes: Recipes, notes: Mapping[str, str], section: Mapping[str, Any]
) -> None:
    """Write the weights as the parts of a folder, each with its config, and the tokenizer."""
    parts, rest = divide(checkpoint, recipes, section)
    for name, content in from_yaml(section, outline(checkpoint, parts["text_encoder"])).items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for part, own in parts.items():
        file = path / part / WEIGHTS.get(part, "diffusion_pytorch_model.safetensors")
        write_safetensors(file, checkpoint, own, {})
    if rest or notes:
        write_safetensors(path / REST, checkpoint, rest, notes)
    write_tokenizer(path / "tokenizer", section["params"]["cond_stage_config"])


def divide(
    checkpoint: Checkpoint, recipes: Recipes, section: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Recipe]], dict[str, Recipe]]:
    """The recipes by the parts of a folder, under the names there, and those that have no place in any."""
    parts: dict[str, dict[str, Recipe]] = {part: {} for part in FOLDER}
    rest = dict(recipes)
    for part, prefix in FOLDER.items():
        own = {name.removeprefix(prefix): name for name in recipes if name.startswith(prefix)}
        names = NAMES[part](own) if part in NAMES else text_names(section, own)
        for short, name in own.items():
            pieces = split(name, checkpoint.outline[recipes[name].source])
            for index in range(len(pieces)):
                theirs = place(short if len(pieces) == 1 else f"{short}/{index}", names)
                if theirs and not HOMELESS.fullmatch(theirs):
                    parts[part][theirs] = recipes[name].then(partial(piece, name, index))
                    rest.pop(name, None)
    return parts, rest


def piece(name: str, index: int, weight: Tensor) -> Tensor:
    return split(name, weight)[index]


def text_names(section: Mapping[str, Any], keys: Collection[str]) -> Names:
    """The names of the text encoder's weights, but for the blocks that the model skips."""
    match (section.get("params") or {}).get("cond_stage_config"):
        case {"target": folder_config.CLIP, **others} if layer(others) == "last":
            return CLIP
        case {"target": folder_config.OPEN_CLIP, **others} if layer(others) in ("last", "penultimate"):
            return open_clip_names(keys, skip=int(layer(others) == "penultimate"))
        case None:
            raise ConfigError("only Stable Diffusion 1 and 2 are written as folders here: name a target that ends in "
                              ".safetensors or .ckpt")
        case stage:
            raise ConfigError(f"the text encoder {stage} has no place in the layout of diffusers")


def layer(stage: Mapping[str, Any]) -> str:
    return (stage.get("params") or {}).get("layer", "last")


def write_tokenizer(path: Path, stage: Mapping[str, Any]) -> None:
    """The vocabulary of the text encoder: that of the folder that the config names, else CLIP's."""
    source = tokenizer_folder(Path((stage.get("params") or {}).get("version", "none")))
    if source is None:
        write_clip_tokenizer(path, pad_token="!" if stage["target"] == folder_config.OPEN_CLIP else END)
        return
    path.mkdir()
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, path / name)
