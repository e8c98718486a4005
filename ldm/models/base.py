"""The base class of every model: Lightning's where a training script has imported it, else a light stand-in.

So inference never imports Lightning, and a script that imports it before `ldm` trains any model, also its own subclass.
"""

import sys

import torch
from torch import nn


class LightModule(nn.Module):
    """What a model uses of LightningModule outside of training."""

    trainer = None
    global_step = 0
    current_epoch = 0

    @property
    def device(self) -> torch.device:
        """Where the first parameter, or else the first buffer, lies."""
        for tensors in (self.parameters(), self.buffers()):
            for tensor in tensors:
                return tensor.device
        return torch.device("cpu")

    def log(self, *args, **kwargs) -> None:
        """Forget a value: nobody is training."""

    def log_dict(self, *args, **kwargs) -> None:
        """Forget some values: nobody is training."""


Module: type[nn.Module] = getattr(sys.modules.get("pytorch_lightning"), "LightningModule", LightModule)
