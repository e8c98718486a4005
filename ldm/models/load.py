"""A config and a checkpoint become a model that is ready to run: the only loader.

The model is built on the meta device, where weights have a shape and no memory, and each of the checkpoint's tensors
is copied once from the memory-mapped file to where it stays: nothing is initialised only to be overwritten, and the
peak of memory is the model itself and one tensor.
"""

import logging
from collections.abc import Mapping
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ldm.checkpoint import UNKNOWN, Checkpoint, identify, open_checkpoint
from ldm.checkpoint.names import COMPUTED, OPTIONAL, TRAINING_ONLY, select_ema
from ldm.config import load_config, model_section
from ldm.errors import CheckpointError, ConfigError, LdmError, OutOfMemory
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.blank import blank
from ldm.util import get_obj_from_str, instantiate_from_config

logger = logging.getLogger(__name__)

# What a config says of training, and what takes its place where the model is only run.
RUN_ONLY = {
    "ckpt_path": None,
    "ema_decay": None,
    "lossconfig": {"target": "torch.nn.Identity"},
    "reset_ema": False,
    "reset_num_ema_updates": False,
    "use_ema": False,
}
LISTED = 4  # names of weights that an error quotes


def load_model(
    config: str | Path | DictConfig,
    checkpoint: str | Path | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool | None = None,
    mapped: bool = False,
    outline: nn.Module | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> nn.Module:
    """The model that a config describes, with the weights of a checkpoint, in eval mode and frozen.

    dtype: of the weights; what the model computes by itself, such as the schedule, keeps its own. use_ema: run the
    averaged weights; None does so if the config keeps them and the file has them. The model owns its memory: the file
    may go; unless it is `mapped`: on the CPU, weights that have the dtype already stay in the file, from where the
    system reads them as they are needed, and takes them back. outline: what `build_model` makes of the config, where it
    has been built already; it becomes the model. layout: of weights (out, in, h, w); convolutions are fastest with
    torch.channels_last.

    Raises ConfigError, CheckpointError (with the family of a checkpoint that another config is for), OutOfMemory.
    """
    section, source = _section(config)
    file = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    model = outline or build_model(config)
    weights = file.tensors
    if _wants_ema(section, file) if use_ema is None else use_ema:
        if not file.has_ema:
            raise CheckpointError(f"{file.path} has no EMA weights, which --use_ema asks for: leave the option out")
        weights = select_ema(weights)
        logger.info("%s: running the EMA weights", file.path)
    chosen = match(model, weights, file, source)
    try:
        assign(model, chosen, file, torch.device(device), dtype, mapped, layout)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{device} has no room for the weights of {file.path}: try --precision bf16") from error
    return model.eval().requires_grad_(False)


def build_model(config: str | Path | DictConfig) -> nn.Module:
    """The model of a config on the meta device, without what only training needs: EMA copies, losses, first weights.

    Raises ConfigError where a target is unknown or does not take its params.
    """
    section, source = _section(config)
    try:
        plain = _run_only(OmegaConf.to_container(section, resolve=True))
        if _is_diffusion(section):
            plain.setdefault("params", {})["use_ema"] = False
        with blank():
            return instantiate_from_config(OmegaConf.create(plain))
    except LdmError:
        raise
    except (TypeError, KeyError, ValueError, RuntimeError, ImportError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source} describes no model that can be built: {type(error).__name__}: {error}") from error


def match(model: nn.Module, weights: Mapping[str, Tensor], file: Checkpoint, source: str) -> dict[str, Tensor]:
    """{name in the model: weight of the file}, for every weight of the model but those that it computes by itself.

    A module that the model has under two names may be in the file under either. Raises CheckpointError where weights
    are missing, unexpected or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    chosen: dict[str, Tensor] = {}
    missing, misshapen = [], []
    for same in names.values():
        found = next((name for name in same if name in weights), None)
        if found is None:
            missing += [name for name in same if own[name].is_meta or not (
                COMPUTED.fullmatch(name) or OPTIONAL.fullmatch(name))]
        elif weights[found].shape != own[found].shape:
            misshapen.append(f"{found} {tuple(weights[found].shape)} instead of {tuple(own[found].shape)}")
        elif own[found].is_meta or not COMPUTED.fullmatch(found) or _is_exact(weights[found], own[found]):
            chosen |= dict.fromkeys(same, weights[found])
    unexpected = [name for name in weights if name not in own and not (
        COMPUTED.fullmatch(name) or TRAINING_ONLY.fullmatch(name))]
    if missing or misshapen or unexpected:
        raise CheckpointError(_misfit(model, file, source, missing, unexpected, misshapen))
    return chosen


def assign(
    model: nn.Module,
    chosen: Mapping[str, Tensor],
    file: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    mapped: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """Put the chosen weights in the model, in `dtype` on `device`, one by one so that memory holds each only once.

    Raises ConfigError where a part of the model is left without a value: it was computed on the meta device.
    """
    own = model.state_dict(keep_vars=True)
    placed: dict[int, Tensor] = {}
    state = {}
    for name, weight in chosen.items():
        if id(own[name]) not in placed:
            kind = dtype if own[name].is_meta and own[name].is_floating_point() else own[name].dtype
            if mapped and device.type == "cpu" and weight.dtype == kind:
                placed[id(own[name])] = weight
            else:
                order = layout if weight.ndim == 4 else torch.contiguous_format
                here = torch.empty(weight.shape, dtype=kind, device=device, memory_format=order)
                # Cast first, then sorted: in one go it takes half as long again.
                placed[id(own[name])] = here.copy_(weight if order is torch.contiguous_format else weight.to(kind))
                file.release(weight)
        state[name] = placed[id(own[name])]
    model.load_state_dict(state, strict=False, assign=True)
    left = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    if left:
        raise ConfigError(f"{type(model).__name__} computes {_some(left)} on the meta device, which holds no values")
    model.to(device)


def _section(config: str | Path | DictConfig) -> tuple[DictConfig, str]:
    """The model section, and what to call the config in an error."""
    if isinstance(config, DictConfig):
        return model_section(config), "the config"
    return model_section(load_config(config), config), str(config)


def _run_only(node: Any) -> Any:
    """A config without what it says of training."""
    if isinstance(node, dict):
        return {key: RUN_ONLY[key] if key in RUN_ONLY else _run_only(value) for key, value in node.items()}
    return [_run_only(item) for item in node] if isinstance(node, list) else node


def _is_diffusion(section: DictConfig) -> bool:
    target = get_obj_from_str(section.target)
    return isinstance(target, type) and issubclass(target, DDPM)


def _wants_ema(section: DictConfig, file: Checkpoint) -> bool:
    """Whether the config keeps averaged weights, or its class does where it is silent, and the file has them."""
    if not file.has_ema:
        return False
    target = get_obj_from_str(section.target)
    own = signature(target).parameters.get("use_ema")
    silent = _is_diffusion(section) if own is None else own.default
    return bool((section.get("params") or {}).get("use_ema", silent))


def _is_exact(weight: Tensor, own: Tensor) -> bool:
    """Whether the file's copy of a computed number is as good as ours: halved schedules and drifted ids are not."""
    return weight.dtype == own.dtype and weight.is_floating_point()


def _misfit(model, file: Checkpoint, source: str, missing: list, unexpected: list, misshapen: list) -> str:
    """What does not fit, in one line; of a checkpoint of another family, which one, and what it is for."""
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    expected = identify({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    if file.family not in (expected, UNKNOWN):
        counts = ", ".join(f"{len(names):,} {what}" for what, names in lists.items() if names)
        article = "an" if file.family.name[0] in "AEIOaeio" else "a"
        return (f"{file.path} does not fit {source} ({counts}): this is {article} {file.family.name} checkpoint: "
                f"{file.family.advice()}")
    details = "; ".join(f"{len(names):,} weights {what}: {_some(names)}" for what, names in lists.items() if names)
    return f"{file.path} does not fit {source}: {details}"


def _some(names: list[str]) -> str:
    """The first of many names; those of a damaged file may be anything."""
    shown = [name if name.isprintable() and len(name) < 200 else repr(name[:200]) for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")
