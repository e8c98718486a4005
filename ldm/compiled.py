"""Compiling a denoiser with torch.compile, so that what was compiled once is there in every later run."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import DeviceError

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++", "cl")


def check_compiler(device: torch.device) -> None:
    """Raise DeviceError where nothing is installed that compiles for a device."""
    named = os.environ.get("CXX")
    if device.type != "cuda" and not any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        raise DeviceError(f"--compile needs a C++ compiler and finds no {named or ' or '.join(COMPILERS)}: install one "
                          "(Debian: apt install g++; macOS: xcode-select --install), or leave --compile out")


def cache_folder() -> Path:
    """Where compiled code is kept: TORCHINDUCTOR_CACHE_DIR, or a folder in the user's cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ldm" / "compiled"
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(usual)))


class Compiled:
    """The forward of a network, compiled when it first meets a size, which it tells; weights are then constants."""

    def __init__(self, network: nn.Module, backend: str, folder: Path):
        self.run = torch.compile(network.forward, backend=backend)
        self.folder = folder
        self.sizes: set[torch.Size] = set()
        self.failure: DeviceError | None = None

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if x.shape in self.sizes:
            return self.run(x, *others, **named)
        if self.failure:  # another try would take as long to come to the same
            raise self.failure
        logger.info("compiling for latents of %dx%d, %d at once, which takes long the first time",
                    x.shape[-1], x.shape[-2], len(x))
        from torch._dynamo.exc import BackendCompilerFailed

        begun = time.perf_counter()
        try:
            out = self.run(x, *others, **named)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip()
            self.failure = DeviceError(f"--compile failed; leave it out, or mend what the compiler says: {reason}")
            raise self.failure from error
        self.sizes.add(x.shape)
        logger.info("compiled in %.0f s; %s keeps it", time.perf_counter() - begun, self.folder)
        return out


def compile_network(network: nn.Module, device: torch.device, backend: str = "inductor") -> None:
    """Have a network compiled at its first call, in place: its weights and their names stay. Once is enough.

    On a processor the weights are frozen into what is compiled, laid out as it wants them.
    """
    if isinstance(network.forward, Compiled):
        return
    folder = cache_folder()  # before the import, which would choose another
    import torch._inductor.config

    torch._inductor.config.freezing = device.type == "cpu"
    network.forward = Compiled(network, backend, folder)
