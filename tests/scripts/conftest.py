"""Running scripts as a user does, on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import KINDS, write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny checkpoints of each kind, by name, each with its config.yaml beside it."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.fixture
def command(tmp_path):
    """Run a script in an empty folder, in a process of its own: command("txt2img", "--prompt", ...)."""

    def run(script: str, *options: object) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        line = [sys.executable, ROOT / "scripts" / f"{script}.py", *map(str, options)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run
