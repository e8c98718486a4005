"""Pictures a minute of one run of many rows, against a run for each of them: the tests' model, 64x64 pixels, 4 steps.

  PYTHONPATH=tests:tests/contracts/goldens:. python benchmarks/one_run.py 200 10

Draws 200 rows in one process of scripts/txt2img.py, then 10 of them in one process each, from which all are counted up.
Processor time is told beside the clock: it does not depend on what else the machine does.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny import write_model

ROOT = Path(__file__).resolve().parents[1]


def spent(*options: object) -> tuple[float, float]:
    """Seconds of the clock and of the processors that a run of scripts/txt2img.py takes."""
    small = ("--W", 64, "--H", 64, "--ddim_steps", 4, "--n_iter", 1, "--device", "cpu", "--skip_grid",
             "--watermark", "off", "--safety", "off", "--quiet")  # fmt: skip
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    line = [sys.executable, ROOT / "scripts" / "txt2img.py", *small, *options]
    subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rows, single = int(sys.argv[1]), int(sys.argv[2])
    prompts = [f"fox number {n}" for n in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        model, file = write_model(Path(folder) / "model"), Path(folder) / "rows.txt"
        file.write_text("\n".join(prompts), encoding="utf-8")
        where = ("--ckpt", model, "--outdir", Path(folder) / "out")
        together = spent(*where, "--from-file", file, "--n_samples", 8)
        alone = [spent(*where, "--prompt", prompt, "--n_samples", 1) for prompt in prompts[:single]]
    every = [sum(times) / single * rows for times in zip(*alone)]
    for name, one, many in zip(("the clock", "processor time"), together, every):
        print(f"by {name}: {rows} rows in one run {one:.0f} s, {60 * rows / one:.0f} pictures a minute; in {rows} runs "
              f"{many:.0f} s, {60 * rows / many:.1f} a minute; {many / one:.0f} times")


if __name__ == "__main__":
    main()
