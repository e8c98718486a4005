"""Random weights of full size, written once: what the benchmarks run is measured on the same numbers by every tool."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
TEXT = "cond_stage_model.transformer.text_model."  # before the names of the text encoder in a checkpoint


@dataclass(frozen=True)
class Files:
    """The same weights of Stable Diffusion 1 in float32, in the three forms that tools read, under one folder."""

    folder: Path

    @property
    def ckpt(self) -> Path:
        return self.folder / "random.ckpt"

    @property
    def safetensors(self) -> Path:
        return self.folder / "random.safetensors"

    @property
    def diffusers(self) -> Path:
        return self.folder / "random-diffusers"

    def write(self) -> None:
        """Write what is not there yet: 4.3 GB each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.ckpt.exists():
            write_checkpoint(self.ckpt)
        for path in (self.safetensors, self.diffusers):
            if not path.exists():
                command = [sys.executable, ROOT / "scripts" / "convert.py", self.ckpt, path, "--config", CONFIG]
                subprocess.run(command, check=True, cwd=ROOT)


def write_checkpoint(path: Path) -> None:
    """Write a .ckpt in the original layout, none of its weights zero, and of a size that keeps activations finite."""
    import torch

    from ldm.models.load import build_model

    torch.manual_seed(0)
    state = {}
    for name, weight in build_model(CONFIG).state_dict().items():
        if not weight.is_meta:  # the noise schedule
            state[name] = weight
        elif weight.ndim < 2:
            state[name] = torch.empty(weight.shape).uniform_(-0.1, 0.1) + float(name.endswith("weight"))  # of norms
        else:
            state[name] = torch.empty(weight.shape).uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
    part = path.with_suffix(".part")
    torch.save({"state_dict": state}, part)
    part.rename(path)
