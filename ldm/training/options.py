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
KNOWN = OPTIONS | RENAMED.keys() | IDLE | GONE.keys()
STRATEGIES = ("ddp", "ddp2", "ddp_spawn", "dp", "ddp_cpu", "horovod")  # which `accelerator` of Lightning 1 could name


def read_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split what the parser of main.py left into key.sub=value overrides and {trainer option: value}.

    Values are read as YAML. Raises RequestError for a word that is neither.
    """
    dotlist: list[str] = []
    flags: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        option, given, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if given and not option.startswith("-"):
            dotlist.append(word)
        elif option.startswith("--") and name in KNOWN:
            if not given:
                follows = words and not words[0].startswith("--") and "=" not in words[0]
                value = words.pop(0) if follows else "true"
            flags[name] = value if name == "gpus" else yaml.safe_load(value)
        else:
            raise RequestError(f"unknown argument {word!r}: options of main.py are in --help, those of Lightning's "
                               "Trainer look like --max_steps 100, changes to the config like model.params.key=value")
    return dotlist, flags


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
