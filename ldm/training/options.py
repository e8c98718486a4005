"""Trainer options from YAML and the command line, those of Lightning 1 among them."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import yaml

from ldm.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

OPTIONS = frozenset(inspect.signature(pl.Trainer).parameters)


def use_devices(value: Any) -> dict[str, Any]:
    """`gpus` of Lightning 1: a number, -1 for all, "0," or "0,1" for those with these numbers."""
    if isinstance(value, str):
        value = [int(n) for n in value.split(",") if n] if "," in value else int(value)
    if value in (0, None, []):
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": "gpu", "devices": value if isinstance(value, int) else list(value)}


# What Lightning 1 called otherwise.
RENAMED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpus": use_devices,
    "checkpoint_callback": lambda value: {"enable_checkpointing": bool(value)},
    "distributed_backend": lambda value: {"strategy": value},
    "num_processes": lambda value: {"devices": value},
    "progress_bar_refresh_rate": lambda value: {"enable_progress_bar": value != 0},
    "reload_dataloaders_every_epoch": lambda value: {"reload_dataloaders_every_n_epochs": int(value)},
    "replace_sampler_ddp": lambda value: {"use_distributed_sampler": value},
    "terminate_on_nan": lambda value: {"detect_anomaly": value},
    "weights_summary": lambda value: {"enable_model_summary": value is not None},
}
# What Lightning 1 had and nothing depends on any more.
IDLE = frozenset(("amp_backend", "amp_level", "auto_select_gpus", "flush_logs_every_n_steps", "log_gpu_memory",
                  "move_metrics_to_cpu", "multiple_trainloader_mode", "prepare_data_per_node", "process_position"))
GONE = {
    "auto_lr_find": "set model.base_learning_rate",
    "auto_scale_batch_size": "set data.params.batch_size",
    "resume_from_checkpoint": "resume with -r LOG",
    "stochastic_weight_avg": "add pytorch_lightning.callbacks.StochasticWeightAveraging to lightning.callbacks",
    "track_grad_norm": "log it from the model",
    "truncated_bptt_steps": "nothing takes its place",
}
STRATEGIES = ("ddp", "ddp2", "ddp_spawn", "dp", "ddp_cpu", "horovod")  # which `accelerator` of Lightning 1 could name


def read_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split what the parser of main.py left into key.sub=value overrides and {trainer option: value}.

    Values read as YAML does. Raises RequestError for a word that is neither.
    """
    dotlist, flags, words = [], {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("-") and "=" in word:
            dotlist.append(word)
            continue
        name, given, value = word.removeprefix("--").replace("-", "_").partition("=") if "=" not in word else (
            word.removeprefix("--").partition("=")[0].replace("-", "_"), "=", word.partition("=")[2])
        if not word.startswith("--") or name not in OPTIONS | RENAMED.keys() | IDLE | GONE.keys():
            raise RequestError(f"unknown argument {word!r}: options of main.py are in --help, those of Lightning's "
                               "Trainer look like --max_steps 100, changes to the config like model.params.key=value")
        if not given:
            value = words.pop(0) if words and not words[0].startswith("--") and not is_override(words[0]) else "true"
        flags[name] = value if name == "gpus" else yaml.safe_load(value)
    return dotlist, flags


def is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of today's Trainer for the options of a config, old or new. Raises ConfigError for unknown ones."""
    current: dict[str, Any] = {}
    for name, value in options.items():
        if name in RENAMED:
            current |= RENAMED[name](value)
        elif name == "accelerator" and value in STRATEGIES:
            current["strategy"] = "ddp" if value in ("ddp2", "ddp_cpu", "dp", "horovod") else value
            if value == "ddp_cpu":
                current["accelerator"] = "cpu"
        elif name in IDLE:
            logger.warning("the trainer option %s of Lightning 1 has no effect any more", name)
        elif name in GONE:
            raise ConfigError(f"Lightning has no trainer option {name} any more: {GONE[name]}")
        elif name not in OPTIONS:
            raise ConfigError(f"Lightning's Trainer has no option {name!r}")
        else:
            current[name] = value
    return current
