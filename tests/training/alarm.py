"""What interrupts a run in the middle, as a callback that a test's config names."""

import os

import pytorch_lightning as pl


class Alarm(pl.Callback):
    """Send this process a signal, or raise an error, when a training batch ends."""

    def __init__(self, step: int, signum: int | None = None):
        self.step, self.signum = step, signum

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        if self.signum is None:
            raise RuntimeError("the disk is on fire")
        os.kill(os.getpid(), self.signum)
