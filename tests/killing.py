"""Runs that are killed at random moments and resumed. As a command:

  PYTHONPATH=tests/contracts/goldens python tests/killing.py 50

Kills that many runs of a tiny model, resumes each until it ends, and compares its files with those of a run that was
never killed, byte for byte. Exits with 1 where they differ.
"""

import logging
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tiny import write_model

from ldm.generation.batch import Run
from ldm.generation.loading import choose, open_run
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.request import Request
from ldm.generation.rows import Row

SMALL = Request(sampler="euler_a", steps=2, scale=1.0, width=32, height=32)
# Two sizes, two samplers and two seeds in turn: batches of rows that are no neighbours.
ROWS = [
    Row(replace(SMALL, prompt=f"a fox {n}", width=32 + 32 * (n % 2), sampler=("euler_a", "ddim")[n % 3 == 0],
                seed=n // 6), f"row {n}")
    for n in range(11)
]  # fmt: skip


def open_tiny(folder: Path) -> Run:
    """A run of a tiny model, ready to be forked."""
    model = ModelOptions(ckpt=str(write_model(folder / "model")), device="cpu", precision="full")
    options = RunOptions(str(folder / "out"), batch_size=3, n_iter=2, watermark="", safety="off")
    run = open_run(ROWS, model, options, lambda event, **facts: None, choose(model))
    run.recorder.sha256  # noqa: B018 -- the thread that works it out would not outlive a fork
    return run


def draw(run: Run, outdir: Path, after: float | None = None) -> bool:
    """Draw in a process of its own, killed `after` seconds; True where it had ended by itself before that."""
    child = os.fork()
    if not child:
        run.options = replace(run.options, outdir=str(outdir), go_on=True)
        logging.disable()
        os._exit(run.draw(ROWS).exit_code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if after is None and status:
        raise RuntimeError(f"a run ended with status {status}")
    return status == 0


def files(outdir: Path) -> dict[str, bytes]:
    """The pictures of a folder; not the manifest, which tells seconds."""
    return {str(path.relative_to(outdir)): path.read_bytes() for path in outdir.rglob("*.png")}


def kill_and_resume(run: Run, folder: Path, kills: int, dice: random.Random) -> tuple[int, int]:
    """Kill so many runs and resume them: how many folders that made, and how many differ from an undisturbed one."""
    begun = time.monotonic()
    draw(run, folder / "undisturbed")
    longest, wanted = time.monotonic() - begun, files(folder / "undisturbed")
    folders = different = 0
    while kills > 0:
        outdir, ended = folder / str(folders), False
        while not ended and kills > 0:
            ended = draw(run, outdir, dice.uniform(0, longest))
            kills -= not ended
        draw(run, outdir)
        folders += 1
        different += files(outdir) != wanted
    return folders, different


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        run = open_tiny(Path(folder))
        folders, different = kill_and_resume(run, Path(folder), count, random.Random(0))
    sys.stdout.write(f"{count} kills, {folders} folders of {2 * len(ROWS)} pictures, {different} of them different\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
