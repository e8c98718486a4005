"""The memory of a run of many rows: a model of the tests' size, 32x32 pixels, one step, prompts that all differ.

  PYTHONPATH=tests:tests/contracts/goldens python benchmarks/many_rows.py 10000

Prints the resident memory, in MB, after each tenth of the pictures.
"""

import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from killing import SMALL
from tiny import write_model

from ldm.generation.loading import choose, open_run
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.rows import Row


def resident() -> float:
    """MB, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    count, made, begun = int(sys.argv[1]), 0, time.monotonic()
    rows = [Row(replace(SMALL, prompt=f"fox number {n}", sampler="ddim", steps=1), f"line {n}") for n in range(count)]

    def tell(event: str, **facts) -> None:
        nonlocal made
        made += event == "saved"
        if event == "saved" and made % (count // 10) == 0:
            sys.stdout.write(f"{made} pictures, {time.monotonic() - begun:.0f} s: {resident():.0f} MB\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        model = ModelOptions(ckpt=str(write_model(Path(folder) / "model")), device="cpu", precision="full")
        options = RunOptions(f"{folder}/out", batch_size=16, skip_grid=True, watermark="", safety="off")
        logging.disable()
        open_run(rows, model, options, tell, choose(model)).draw(rows)


if __name__ == "__main__":
    main()
