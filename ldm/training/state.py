"""What lets an interrupted run go on as if nothing had happened.

Chance depends on the number of the step alone, and last.ckpt is written between two steps.
"""

import logging
import signal
import time
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to end, and it ended between two steps; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StepSeed(Callback):
    """Seed the generators of torch before each batch by the number of the batch and of the process.

    Whatever was drawn between two batches, for validation, pictures or a restart, training draws the same.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.set(trainer, done=trainer.fit_loop.epoch_loop.batch_progress.total.processed - 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        self.set(trainer, done=trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def set(self, trainer: Trainer, done: int) -> None:
        """Seed for the batch after so many."""
        torch.manual_seed(hash((self.seed, done * trainer.world_size + trainer.global_rank)) % 2**63)


class LastCheckpoint(Callback):
    """Write `path` every so many minutes, at the end, and when the run is interrupted by an error or a signal.

    It is written before a batch begins, when the EMA copy has followed the last one (`on_train_batch_end` of a callback
    comes too early for that) and no gradients are kept. SIGINT and SIGTERM end the run, asked twice at once;
    SIGUSR1 only writes.
    """

    def __init__(self, path: str | Path, minutes: float = 5.0):
        self.path = Path(path)
        self.seconds = 60 * minutes
        self.written = time.monotonic()
        self.asked: int | None = None
        self.training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training = True
        self.written = time.monotonic()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self.ask)

    def ask(self, signum: int, frame) -> None:
        """Remember a signal until the next batch; the same one again has its usual effect."""
        self.asked = signum
        if signum != signal.SIGUSR1:
            logger.info("%s: stopping after this step", signal.Signals(signum).name)
            signal.signal(signum, signal.default_int_handler)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        late = time.monotonic() - self.written >= self.seconds
        asked, late = trainer.strategy.broadcast((self.asked, late))  # the first process decides for all
        if (asked is None and not late) or batch_idx % self.accumulated(trainer, pl_module):
            return
        if asked in (signal.SIGINT, signal.SIGTERM):
            raise Stopped(asked)
        self.asked = None
        self.write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.training:
            self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)
        self.training = False

    def accumulated(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """How many batches make a step."""
        automatic = pl_module.automatic_optimization
        return trainer.accumulate_grad_batches if automatic else getattr(pl_module, "accumulate_grad_batches", 1)

    def write(self, trainer: Trainer) -> None:
        """Write the checkpoint.

        On resuming one with a batch under way, Lightning counts a logging step more than was taken; it is taken off
        here, so that the curves of both runs meet.
        """
        loop = trainer.fit_loop.epoch_loop
        extra = int(loop.batch_progress.total.ready != loop.batch_progress.total.processed)
        loop._batches_that_stepped -= extra
        trainer.save_checkpoint(self.path, weights_only=False)
        loop._batches_that_stepped += extra
        self.written = time.monotonic()
        if trainer.is_global_zero:
            logger.info("wrote %s at step %d", self.path, trainer.global_step)
