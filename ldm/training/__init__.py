"""Training with Lightning: the run that a YAML config describes, and what `main.` targets in YAML name."""

import importlib

_HOMES = {
    "CUDACallback": "ldm.training.callbacks",
    "ChannelsLast": "ldm.training.callbacks",
    "DataModuleFromConfig": "ldm.data.module",
    "ImageLogger": "ldm.training.callbacks",
    "LearningRateMonitor": "pytorch_lightning.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "WrappedDataset": "ldm.data.module",
    "instantiate_from_config": "ldm.util",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Import what is asked for, so that the name of this package costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
