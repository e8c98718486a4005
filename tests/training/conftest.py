"""A tiny run of main.py: latent diffusion with EMA, a warm-up and caption dropout, on the smallest shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import GOLDENS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def tiny_config() -> dict:
    """The golden model on pictures of 32x32, six batches an epoch; its text states come as they are in the batch."""
    config = OmegaConf.to_container(OmegaConf.load(GOLDENS / "tiny.yaml"))
    model = config["model"]["params"]
    model |= {
        "image_size": 4, "use_ema": True, "scale_by_std": True, "scale_factor": 1.0, "first_stage_key": "image",
        "cond_stage_key": "caption", "ucg_training": {"caption": {"p": 0.5, "val": ""}},
        "scheduler_config": {
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {"warm_up_steps": [5], "f_min": [1.0], "f_max": [1.0], "f_start": [0.1], "cycle_lengths": [100]},
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(GOLDENS / "tiny-clip"), "max_length": 16},
        },
    }  # fmt: skip
    model["unet_config"]["params"] |= {"channel_mult": [1, 2], "attention_resolutions": [2]}
    shapes = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": 12, "seed": 1, "size": 16}}
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "num_workers": 0, "train": shapes, "validation": shapes},
    }
    config["lightning"] = {
        "trainer": {"accelerator": "cpu", "max_steps": 9, "log_every_n_steps": 1, "limit_val_batches": 1,
                    "enable_progress_bar": False, "enable_model_summary": False},
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
    }  # fmt: skip
    return config


class Runs:
    """Runs main.py in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "tiny.yaml"
        OmegaConf.save(OmegaConf.create(tiny_config()), self.config)

    def run(self, *words: str | Path) -> tuple[int, str]:
        """The exit code of a run, and what it wrote."""
        command = [sys.executable, str(ROOT / "main.py"), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
        done = subprocess.run(command, cwd=self.folder, env=environment, text=True, capture_output=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    def train(self, name: str, *words: str | Path, code: int = 0) -> Path:
        """Train a new run, see it end with an exit code, and return its log folder."""
        start = words if "-b" in words else ("-b", self.config, *words)
        found, output = self.run(*start, "-t", "--no-test", "-n", name, "-l", self.folder)
        assert found == code, output
        (logs,) = self.folder.glob(f"*_{name}")
        return logs


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(runs) -> Path:
    """The log folder of a run that nothing interrupted."""
    return runs.train("whole")
