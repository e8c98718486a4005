"""From options to a run that is ready to draw: what can be checked is checked before a weight is read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import UNKNOWN, Checkpoint, open_checkpoint
from ldm.checkpoint.folder_config import is_folder
from ldm.checkpoint.names import EMA
from ldm.compiled import check_compiler, compile_network
from ldm.config import load_config, model_section
from ldm.download import MODELS
from ldm.errors import CheckpointError, RequestError
from ldm.generation.adapters import read_adapters
from ldm.generation.batch import Run
from ldm.generation.events import Tell
from ldm.generation.finish import Finisher
from ldm.generation.geometry import Geometry, geometry
from ldm.generation.kept import Content, held, once
from ldm.generation.options import LATENT_UPSCALER, ModelOptions, RunOptions, find, find_checkpoint
from ldm.generation.pipeline import Pipeline
from ldm.generation.record import Recorder
from ldm.generation.rows import Row, check_rows
from ldm.image.io import check_outdir
from ldm.memory import (
    DTYPES,
    SAVINGS,
    as_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_memory,
    pick_precision,
    place,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.load import build_model, load_model
from ldm.models.probe import noise_returned
from ldm.util import get_obj_from_str

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The files of a model, its `model:` section, and the sizes that it works in.

    file: opens the checkpoint, once for all who ask; grammar: where the config names one, what raises RequestError for
    a prompt that the model never learnt to read.
    """

    config: Path
    checkpoint: Path
    section: DictConfig
    geometry: Geometry
    file: Callable[[], Checkpoint]
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
        if options.ckpt == LATENT_UPSCALER:
            raise CheckpointError(f"there is no folder {options.ckpt}: put stabilityai/sd-x2-latent-upscaler of the "
                                  "Hugging Face hub there, or name yours")
    if checkpoint != find(options.ckpt):
        logger.info("no checkpoint at %s: this is %s, which draws coloured shapes alone; python scripts/fetch_model.py "
                    "v1.4 gets Stable Diffusion", options.ckpt, checkpoint)
    file = cache(partial(open_checkpoint, checkpoint))
    config = find(options.config or shipped_config(checkpoint, file))
    content = load_config(config)
    section, grammar = model_section(content, config), content.get("prompt_grammar")
    check_kind(section.target, made_for, checkpoint)
    return Chosen(config, checkpoint, section, geometry(section, config), file,
                  grammar and get_obj_from_str(grammar["target"]))


def check_kind(target: str, made_for: Sequence[str], checkpoint: Path) -> None:
    """Raise RequestError, with what does it instead, where a model is none of those that a script is made for."""
    kinds = [kind.__name__ for kind in get_obj_from_str(target).__mro__]
    if not made_for or set(made_for) & set(kinds):
        return
    family = open_checkpoint(checkpoint).family
    name = kinds[0] if family is UNKNOWN else family.name
    script = family.script or "another script, such as scripts/txt2img.py"
    raise RequestError(f"{checkpoint} ({name}) is no {' or '.join(made_for)}, which is needed here: use {script} for "
                       "it, or name another checkpoint")


def choose_refiner(path: str) -> Chosen:
    """As `choose`, of a second model, whose YAML cannot be named but may lie beside it."""
    try:
        return choose(ModelOptions(ckpt=path))
    except CheckpointError as error:
        hint = "put its YAML beside it as config.yaml"
        raise CheckpointError(str(error).replace("name its YAML with --config", hint)) from error


def choose_upscaler(path: str, first: Chosen) -> Chosen:
    """As `choose`, of a model that enlarges the latents of the first. Raises RequestError where it cannot."""
    chosen = choose(ModelOptions(ckpt=path), ["LatentUpscale2xDiffusion"])
    drawn, taken = (
        (one.geometry.channels, one.geometry.factor, one.section.params.get("scale_factor", 1.0))
        for one in (first, chosen)
    )
    if drawn != taken:
        raise RequestError(f"{chosen.checkpoint} enlarges other latents than {first.checkpoint} draws: take "
                           "scripts/upscale.py, which starts from pictures")
    return chosen


def together(models: Sequence[Chosen], outlines: Sequence[LatentDiffusion]) -> Geometry:
    """The sizes that a model and its refiner, if there is one, both work in; outlines: the same, without weights.

    Raises RequestError where they do not share their latents and noise levels.
    """
    first, *others = (one.geometry for one in models)
    for chosen, own, model in zip(models[1:], others, outlines[1:]):
        if (own.channels, own.factor) != (first.channels, first.factor):
            raise RequestError(f"{chosen.checkpoint} draws other latents than {models[0].checkpoint} ({own.channels} "
                               f"channels, not {first.channels}): a refiner goes on with those of the first model")
        levels = outlines[0].alphas_cumprod, model.alphas_cumprod
        if len(levels[0]) != len(levels[1]) or not torch.allclose(*levels, rtol=1e-3):
            raise RequestError(f"{chosen.checkpoint} was trained on other noise levels than {models[0].checkpoint}: "
                               "it cannot go on with its latents")
    return replace(first, step=max(one.geometry.step for one in models))


def shipped_config(checkpoint: Path, file: Callable[[], Checkpoint] | None = None) -> str:
    """The config that belongs to what the checkpoint says it is; the one beside it, or in its folder, comes first.

    file: opens the checkpoint, if it has to be.
    """
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.yaml"
    if beside.exists():
        return str(beside)
    if is_folder(checkpoint):
        return str(checkpoint)
    family = (file() if file else open_checkpoint(checkpoint)).family
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


def weigh(file: Checkpoint, dtype: torch.dtype) -> int:
    """How many bytes the weights of a checkpoint take in `dtype`, without those of which there is an average too."""
    return sum(weight.numel() for name, weight in file.outline.items() if not name.startswith(EMA)) * dtype.itemsize


def open_run(
    rows: Sequence[Row], model: ModelOptions, options: RunOptions, tell: Tell, chosen: Chosen
) -> Run:
    """Check each row against the model that the config describes, and the output folder, then load the model.

    Raises RequestError, ModelError, OutOfMemory.
    """
    device = pick_device(model.device)
    if model.compile:
        check_compiler(device)
    models = [chosen, *([choose_refiner(model.refiner)] if model.refiner else [])]
    outlines = [build_model(one.config) for one in models]
    sizes = together(models, outlines)
    upscaler = choose_upscaler(model.upscaler, chosen) if model.upscaler else None
    larger = upscaler and Pipeline(build_model(upscaler.config), upscaler.geometry)
    check_rows(rows, Pipeline(outlines[0], sizes, "full", *outlines[1:], upscaler=larger, compiled=model.compile).check)
    if chosen.grammar:
        check_prompts(rows, chosen.grammar)
    check_outdir(options.outdir)
    adapters = read_adapters(model)
    finish = Finisher(options)
    if options.watermark is None:
        finish.text = chosen.file().family.watermark
    precision = pick_precision(model.precision, device)
    weights = 0
    for one in (*models, *([upscaler] if upscaler else [])):
        logger.debug("%s, built as %s says, on %s in %s precision", one.checkpoint, one.config, device, precision)
        weights += weigh(one.file(), DTYPES[precision])
    memory = pick_memory(model.memory, device, weights, held(device))
    saving = SAVINGS[memory]
    compiled = model.compile and not saving.stages
    if model.compile and not compiled:
        logger.warning("--compile is left out: with --memory %s weights come and go", memory)
    if device.type == "cpu" and not saving.stages:
        keep_freed_memory()

    def load(one: Chosen, outline: LatentDiffusion) -> LatentDiffusion:
        with as_out_of_memory(f"{device} has no room for {one.checkpoint}: try --memory lowest or --precision bf16"):
            loaded = load_model(
                one.config,
                one.file(),
                device="cpu" if saving.stages else device,
                dtype=DTYPES[precision],
                use_ema=model.use_ema,
                mapped=saving.network,
                outline=outline,
                layout=torch.contiguous_format if saving.network else torch.channels_last,
            )
            if one is chosen:
                adapters.put_into(loaded)
            elif one is not upscaler:
                loaded.first_stage_model = None  # what a refiner draws is decoded by the first model's
            return loaded

    parts = list(zip(models, outlines, strict=True))
    if upscaler:
        parts.append((upscaler, larger.model))
    if saving.stages or model.lora or model.embedding:  # memory is short, or the weights are not the checkpoint's own
        once({})
        loaded = [load(*part) for part in parts]
    else:
        setting = device, precision, model.use_ema, compiled
        loaded = once({(role, Content(one.checkpoint), OmegaConf.to_yaml(one.section), *setting):
                       partial(load, one, outline) for role, (one, outline) in enumerate(parts)})
    how = {
        "device": device.type,
        "precision": precision,
        "memory": memory,
        "compile": compiled,
        "use_ema": model.use_ema,
        "watermark": finish.text,
        "safety": options.safety,
        **adapters.told,
    }
    recorder = Recorder(chosen.config, chosen.checkpoint, how)
    placed = [place(one, device, memory) for one in loaded]
    if compiled:
        for one in placed:
            compile_network(one.model.diffusion_model, device)
    if upscaler:
        larger = Pipeline(placed.pop(), upscaler.geometry, precision)
    pipeline = Pipeline(placed[0], sizes, precision, *placed[1:], upscaler=larger, compiled=compiled)
    return Run(pipeline, options, finish, recorder, tell)
