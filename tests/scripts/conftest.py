"""Running scripts as a user does, on tiny models: as commands, and, where that is all that matters, in this process."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from tiny import KINDS, write_model

from ldm.generation.command import execute

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


class Outcome(NamedTuple):
    """What a script came to: its exit code, and the lines that it wrote."""

    code: int
    out: list[str]
    err: list[str]

    @property
    def said(self) -> str:
        """The one line on stderr of a script that failed as a whole: no traceback, nothing more."""
        assert len(self.err) == 1, self.err
        return self.err[0]


@pytest.fixture
def source():
    """What a script defines, by name: source("txt2img")["parse"]."""
    return lambda name: runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


@pytest.fixture
def script(source, tmp_path, monkeypatch, capsys):
    """As `command`, in this process: the same parse, main and execute, without the seconds that torch takes to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    loggers = [logging.getLogger(), logging.getLogger("ldm")]
    levels = [logger.level for logger in loggers]

    def run(name: str, *options: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        capsys.readouterr()
        try:
            code = execute(source(name)["main"])
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        return Outcome(code, written.out.splitlines(), written.err.splitlines())

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def photo(tmp_path):
    """A picture of 64x64 pixels, of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path):
    """The mask of `photo` whose left half is repainted."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"
