"""The models of a process's last run, kept for its next: a notebook that draws and then paints over loads them once."""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import checkpoint_hash
from ldm.generation.inputs import fingerprint

_kept: dict[Hashable, nn.Module] = {}


class Content:
    """What a checkpoint holds, a file or a folder: equal to that of a copy of it, and to nothing once it has changed.

    Hashes are asked for only where two places hold files of the same sizes.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.files = stamps(checkpoint)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for _, size, _ in self.files)

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Content) or self.sizes != other.sizes:
            return False
        unchanged = all(one.files == stamps(one.checkpoint) for one in (self, other))
        same_place = self.files == other.files
        return unchanged and (same_place or checkpoint_hash(self.checkpoint) == checkpoint_hash(other.checkpoint))


def stamps(checkpoint: Path) -> tuple:
    """Place, size and time of each file of a checkpoint."""
    files = sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]
    return tuple(fingerprint(str(file.resolve())) for file in files if file.is_file())


def once(wanted: Mapping[Hashable, Callable[[], nn.Module]]) -> list[nn.Module]:
    """The models under these keys, each made unless the last call had it; what is not wanted now is let go first."""
    found = {key: _kept[key] for key in wanted if key in _kept}
    _kept.clear()
    for key, make in wanted.items():
        _kept[key] = found.pop(key) if key in found else make()
    return list(_kept.values())


def held(device: torch.device) -> int:
    """The bytes of a device in kept models, which the next run has too: it uses these models or lets them go."""
    weights = {weight.data_ptr(): weight.nbytes for model in _kept.values()
               for weight in (*model.parameters(), *model.buffers()) if weight.device.type == device.type}
    return sum(weights.values())
