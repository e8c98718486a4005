"""From options to a run that is ready to draw: what can be checked is checked before a weight is read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.checkpoint import UNKNOWN, open_checkpoint
from ldm.checkpoint.folder_config import is_folder
from ldm.checkpoint.names import EMA
from ldm.config import load_config, model_section
from ldm.download import MODELS
from ldm.errors import CheckpointError, RequestError
from ldm.generation.adapters import read_adapters
from ldm.generation.batch import Run
from ldm.generation.events import Tell
from ldm.generation.finish import Finisher
from ldm.generation.geometry import Geometry, geometry
from ldm.generation.options import ModelOptions, RunOptions, find, find_checkpoint
from ldm.generation.pipeline import Pipeline
from ldm.generation.record import Recorder
from ldm.generation.rows import Row, check_rows
from ldm.image.io import check_outdir
from ldm.memory import DTYPES, SAVINGS, as_out_of_memory, pick_device, pick_memory, pick_precision, place
from ldm.models.load import build_model, load_model
from ldm.models.probe import noise_returned
from ldm.util import get_obj_from_str

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The files of a model, its `model:` section, and the sizes that it works in.

    grammar: where the config names one, what raises RequestError for a prompt that the model never learnt to read.
    """

    config: Path
    checkpoint: Path
    section: DictConfig
    geometry: Geometry
    grammar: Callable[[str], Any] | None = None


def choose(options: ModelOptions, made_for: Sequence[str] = ()) -> Chosen:
    """Find the config and the checkpoint. Without a config, a checkpoint that tells its family names the shipped one.

    Without a checkpoint, the model that ships with the project is taken, and it is said that it is.
    made_for: the classes of the models that a script is made for; () where it takes them all.
    Raises ConfigError, CheckpointError, RequestError for a model of another class.
    """
    checkpoint = find_checkpoint(options)
    if not checkpoint.exists():
        for alias, model in MODELS.items():
            if options.ckpt == f"{model.folder}/{model.link}":
                raise CheckpointError(
                    f"there is no checkpoint at {options.ckpt}: put {model.what} there, have it fetched with "
                    f"python scripts/fetch_model.py {alias}, or name yours with --ckpt FILE"
                )
    if checkpoint != find(options.ckpt):
        logger.info("no checkpoint at %s: this is %s, which draws coloured shapes alone; python scripts/fetch_model.py "
                    "v1.4 gets Stable Diffusion", options.ckpt, checkpoint)
    config = find(options.config or shipped_config(checkpoint))
    content = load_config(config)
    section, grammar = model_section(content, config), content.get("prompt_grammar")
    check_kind(section.target, made_for, checkpoint)
    return Chosen(config, checkpoint, section, geometry(section, config),
                  grammar and get_obj_from_str(grammar["target"]))


def check_kind(target: str, made_for: Sequence[str], checkpoint: Path) -> None:
    """Raise RequestError, with what does it instead, where a model is none of those that a script is made for."""
    kinds = [kind.__name__ for kind in get_obj_from_str(target).__mro__]
    if not made_for or set(made_for) & set(kinds):
        return
    family = open_checkpoint(checkpoint).family
    name = kinds[0] if family is UNKNOWN else family.name
    script = family.script or "another script, such as scripts/txt2img.py"
    raise RequestError(f"{checkpoint} ({name}) is no model for this script, which runs a {' or '.join(made_for)}: "
                       f"use {script}, or name another checkpoint with --ckpt")


def shipped_config(checkpoint: Path) -> str:
    """The config that belongs to what the checkpoint says it is; the one beside it, or in its folder, comes first."""
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.yaml"
    if beside.exists():
        return str(beside)
    if is_folder(checkpoint):
        return str(checkpoint)
    family = open_checkpoint(checkpoint).family
    if family.instead:
        raise CheckpointError(f"{checkpoint} is no model by itself ({family.name}): {family.instead}")
    if not family.config:
        raise CheckpointError(f"{checkpoint} ({family.name}) does not tell its config: name its YAML with --config")
    config, told = family.config, ""
    if family.eps:
        returned = noise_returned(find(family.config), checkpoint)
        config = family.eps if returned > 0.5 else family.config
        told = f", and of noise alone it gives back {max(returned, 0.0):.0%}"
    logger.info("%s is of the family %s%s: using %s", checkpoint, family.name, told, config)
    return config


def check_prompts(rows: Sequence[Row], grammar: Callable[[str], Any]) -> None:
    """Warn, in one line, of the prompts that are outside a model's grammar."""
    outside = []
    for prompt in dict.fromkeys(row.request.prompt for row in rows if row.request.prompt):
        try:
            grammar(prompt)
        except RequestError as error:
            outside.append(error)
    if outside:
        others = f" (and so for {len(outside) - 1} more)" if len(outside) > 1 else ""
        logger.warning("this model has not learnt to draw that: %s%s", outside[0], others)


def weigh(checkpoint: Path, dtype: torch.dtype) -> int:
    """How many bytes the weights of a checkpoint take in `dtype`, without those of which there is an average too."""
    outline = open_checkpoint(checkpoint).outline
    return sum(weight.numel() for name, weight in outline.items() if not name.startswith(EMA)) * dtype.itemsize


def open_run(
    rows: Sequence[Row], model: ModelOptions, options: RunOptions, tell: Tell, chosen: Chosen
) -> Run:
    """Check each row against the model that the config describes, and the output folder, then load the model.

    Raises RequestError, ModelError, OutOfMemory.
    """
    device = pick_device(model.device)
    outline = build_model(chosen.config)
    check_rows(rows, Pipeline(outline, chosen.geometry).check)
    if chosen.grammar:
        check_prompts(rows, chosen.grammar)
    check_outdir(options.outdir)
    adapters = read_adapters(model)
    finish = Finisher(options)
    if options.watermark is None:
        finish.text = open_checkpoint(chosen.checkpoint).family.watermark
    precision = pick_precision(model.precision, device)
    logger.debug("%s, built as %s says, on %s in %s precision", chosen.checkpoint, chosen.config, device, precision)
    memory = pick_memory(model.memory, device, weigh(chosen.checkpoint, DTYPES[precision]))
    saving = SAVINGS[memory]
    with as_out_of_memory(f"{device} has no room for {chosen.checkpoint}: try --memory lowest or --precision bf16"):
        loaded = load_model(
            chosen.config,
            chosen.checkpoint,
            device="cpu" if saving.stages else device,
            dtype=DTYPES[precision],
            use_ema=model.use_ema,
            mapped=saving.network,
            outline=outline,
        )
        adapters.put_into(loaded)
    how = {
        "device": device.type,
        "precision": precision,
        "memory": memory,
        "use_ema": model.use_ema,
        "watermark": finish.text,
        "safety": options.safety,
        **adapters.told,
    }
    recorder = Recorder(chosen.config, chosen.checkpoint, how)
    return Run(Pipeline(place(loaded, device, memory), chosen.geometry, precision), options, finish, recorder, tell)
