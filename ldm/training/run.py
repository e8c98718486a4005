"""One training run: configs and options become a model, its data and a Lightning trainer, and the trainer runs."""

import argparse
import datetime
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl  # before any model is imported: the models' base class is then Lightning's
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.config import merge_configs, model_section
from ldm.data.module import DataModuleFromConfig
from ldm.errors import CheckpointError, ConfigError, RequestError
from ldm.memory import keep_freed_memory
from ldm.training.options import read_overrides, trainer_options
from ldm.training.state import LastCheckpoint, StepSeed, Stopped
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

SEED = 23  # of a run that is given none
KEPT_MEMORY = (1 << 31) - 1  # bytes that a step leaves for the next one on processors: the most that can be asked for


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files: `checkpoint` is where it goes on from, `configs` what it was started with."""

    logdir: Path
    checkpoint: Path | None
    configs: tuple[Path, ...]

    @property
    def checkpoints(self) -> Path:
        return self.logdir / "checkpoints"


def find_place(options: argparse.Namespace, now: str) -> Place:
    """The folder of a run: a new one, or that of the run to resume. Raises RequestError where there is none such."""
    resume = options.resume or options.project
    if not resume:
        stem = options.name or (Path(options.base[0]).stem if options.base else "")
        name = "_".join(part for part in (now, stem) if part) + options.postfix
        return Place(Path(options.logdir) / name, None, tuple(map(Path, options.base)))
    if options.name:
        raise RequestError("-n/--name names a new run and -r/--resume an old one: give one of them; "
                           "-n together with -l starts a new run elsewhere")
    found = Path(resume)
    if not found.exists():
        raise RequestError(f"nothing to resume at {found}: give the log folder of a run, or a checkpoint in it")
    if found.is_file():
        logdir, checkpoint = found.parent.parent, found
    else:
        logdir, checkpoint = found, found / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        raise RequestError(f"{logdir} has no checkpoints/last.ckpt: name the checkpoint to go on from")
    return Place(logdir, checkpoint, (*sorted((logdir / "configs").glob("*.yaml")), *map(Path, options.base)))


def starting_time() -> str:
    """When the run began, by which its folder is called: the first process tells those that Lightning starts for it."""
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if "LOCAL_RANK" not in os.environ:
        os.environ["LDM_STARTED"] = now
    return os.environ.get("LDM_STARTED", now)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Carry out a command line of main.py; 0, or 128 + the number of the signal that ended the run.

    Raises ConfigError and RequestError, which say what to change.
    """
    now = starting_time()
    dotlist, flags = read_overrides(overrides)
    place = find_place(options, now)
    if not place.configs:
        raise RequestError("nothing to run: name a config with -b/--base, or a log folder with -r/--resume")
    config = merge_configs(place.configs, dotlist)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config refers to what is not in it: {' '.join(str(error).split())}") from error
    lightning = config.pop("lightning", OmegaConf.create())
    settings = trainer_options({**lightning.get("trainer", {}), **flags})
    lightning.seed = seed = lightning.get("seed", SEED) if options.seed is None else options.seed
    pl.seed_everything(seed, workers=True, verbose=False)

    model = instantiate_from_config(model_section(config, place.configs[-1]))
    if not isinstance(model, pl.LightningModule):
        raise ConfigError(f"{config.model.target} is no LightningModule; import pytorch_lightning before ldm to train")
    data = instantiate_from_config(with_seed(config.get("data"), seed))
    if not model.automatic_optimization:
        model.accumulate_grad_batches = settings.pop("accumulate_grad_batches", 1)
    trainer = make_trainer(settings, lightning, place, now, model, data, config)
    model.learning_rate = learning_rate(config, trainer, model, options.scale_lr)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory(KEPT_MEMORY)

    if options.train:
        try:
            trainer.fit(model, datamodule=data, ckpt_path=place.checkpoint, weights_only=True)
        except Stopped as stop:
            logger.info("stopped by %s; go on with: python main.py -t -r %s", stop, place.logdir)
            return 128 + stop.signum
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"cannot resume {place.checkpoint}: it is damaged, or asks to run code") from error
    if not options.no_test and is_overridden("test_step", model, pl.LightningModule):
        trainer.test(model, datamodule=data, ckpt_path=None if options.train else place.checkpoint)
    return 0


def with_seed(section: DictConfig | None, seed: int) -> DictConfig:
    """The data section, with the run's seed for the order of its examples."""
    if section is None:
        raise ConfigError("the config has no data section: give it a target such as main.DataModuleFromConfig")
    if section.get("target") in ("main.DataModuleFromConfig", "ldm.data.module.DataModuleFromConfig"):
        return OmegaConf.merge({"params": {"seed": seed}}, section)
    return section


def make_trainer(
    settings: dict[str, Any], lightning: DictConfig, place: Place, now: str,
    model: pl.LightningModule, data: pl.LightningDataModule, config: DictConfig,
) -> pl.Trainer:
    """The trainer with the loggers, checkpoints and callbacks that every run has, as far as the YAML changes none."""
    logdir = place.logdir
    setup = {"resume": str(place.checkpoint or ""), "now": now, "logdir": str(logdir), "config": config,
             "ckptdir": str(place.checkpoints), "cfgdir": str(logdir / "configs"), "lightning_config": lightning}
    callbacks = {
        "setup_callback": {"target": "main.SetupCallback", "params": setup},
        "image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4}},
        "learning_rate_logger": {"target": "main.LearningRateMonitor", "params": {"logging_interval": "step"}},
        "cuda_callback": {"target": "main.CUDACallback"},
    }
    if "metrics_over_trainsteps_checkpoint" in lightning.get("callbacks", {}):
        callbacks["metrics_over_trainsteps_checkpoint"] = {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": {"dirpath": str(place.checkpoints / "trainstep_checkpoints"), "save_weights_only": True,
                       "filename": "{epoch:06}-{step:09}", "save_top_k": -1, "every_n_train_steps": 10000},
        }  # fmt: skip
    asked = OmegaConf.merge(callbacks, lightning.get("callbacks", {}))
    last = {"minutes": 5.0, **lightning.get("last_checkpoint", {})}
    made = [StepSeed(lightning.seed), *(instantiate_from_config(c) for c in asked.values() if c is not None)]
    if settings.get("enable_checkpointing", True):
        made += [model_checkpoint(lightning, place, model), LastCheckpoint(place.checkpoints / "last.ckpt", **last)]
    loggers = [
        TensorBoardLogger(logdir, name="tensorboard", version=""),
        CSVLogger(logdir, name="csv", version=now),
    ]
    if "logger" in lightning:
        loggers.append(instantiate_from_config(lightning.logger))
    defaults = {"logger": loggers, "callbacks": made, "default_root_dir": str(logdir)}
    if lightning.get("find_unused_parameters") and settings.get("strategy") == "ddp":
        settings["strategy"] = "ddp_find_unused_parameters_true"
    if isinstance(data, DataModuleFromConfig):  # whose samplers know of ranks by themselves
        defaults["use_distributed_sampler"] = False
    trainer = new_trainer({**defaults, **settings})
    check_strategy(trainer.strategy, model)
    return trainer


def new_trainer(options: Mapping[str, Any]) -> pl.Trainer:
    """Lightning's Trainer. Raises ConfigError, in one line, for what it does not take or cannot carry out here."""
    try:
        return pl.Trainer(**options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"Lightning's Trainer does not take these options: {' '.join(str(error).split())}") from error


def check_strategy(strategy: Strategy, model: pl.LightningModule) -> None:
    """Raise ConfigError where each process is to hold a part of the weights, of which the EMA copy needs the whole."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and getattr(model, "use_ema", False):
        raise ConfigError("sharded weights have no EMA copy: set model.params.use_ema=false, or strategy: ddp")


def model_checkpoint(lightning: DictConfig, place: Place, model: pl.LightningModule) -> ModelCheckpoint:
    """The checkpoints besides last.ckpt: of the best epochs where the model names what to monitor, else of the last."""
    monitor = getattr(model, "monitor", None)
    best = {"monitor": monitor, "save_top_k": 3} if monitor else {}
    default = {
        "target": "pytorch_lightning.callbacks.ModelCheckpoint",
        "params": {"dirpath": str(place.checkpoints), "filename": "{epoch:06}", "verbose": True, **best},
    }
    section = OmegaConf.merge(default, lightning.get("modelcheckpoint", {}), {"params": {"save_last": False}})
    return instantiate_from_config(section)


def learning_rate(config: DictConfig, trainer: pl.Trainer, model: pl.LightningModule, scale: bool) -> float:
    """base_learning_rate, multiplied with `scale` by the number of examples that an update sees."""
    if "base_learning_rate" not in config.model:
        raise ConfigError("the model section has no base_learning_rate")
    base = float(config.model.base_learning_rate)
    if not scale:
        return base
    batch = config.data.get("params", {}).get("batch_size", 1)
    batches = trainer.accumulate_grad_batches if model.automatic_optimization else model.accumulate_grad_batches
    logger.info("learning rate %.2e = %d devices * %d a batch * %d batches * %.2e",
                trainer.world_size * batch * batches * base, trainer.world_size, batch, batches, base)
    return trainer.world_size * batch * batches * base
