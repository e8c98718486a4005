"""How long things take, told so that what else the machine does meanwhile falls on both sides alike."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Timing:
    """Runs of one side: seconds of the clock, seconds of processor time of all threads, and what else was told."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, run: Callable[[], Any]) -> None:
        """Time one call; a dict that it gives is kept, and its `seconds` and `cpu` stand for the call's own."""
        begun, used = time.perf_counter(), time.process_time()
        facts = run()
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        facts = facts if isinstance(facts, dict) else {}
        self.wall.append(facts.get("seconds", wall))
        self.cpu.append(facts.get("cpu", cpu))
        self.facts.append(facts)


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[Timing, Timing]:
    """Time both in the order A-B-B-A, two calls of each in a round."""
    sides = Timing(), Timing()
    for _ in range(rounds):
        for side, run in zip((0, 1, 1, 0), (ours, theirs, theirs, ours)):
            sides[side].add(run)
    return sides


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of `alternate` of what ours took by what theirs did."""
    rounds = (zip(values[::2], values[1::2]) for values in (ours, theirs))
    return median(sum(mine) / sum(other) for mine, other in zip(*rounds))


def fresh(*command: object) -> dict[str, Any]:
    """What a Python command in a fresh process tells in a line of JSON, the `seconds` until then from its start, the
    processor time of it all as `cpu`, and as `peak` the most bytes that were resident; what it tells itself wins."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    told: dict[str, Any] = {}
    for line in process.stdout:
        if line.startswith("{"):
            told = {"seconds": time.perf_counter() - begun, **json.loads(line)}
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begun, "cpu": cpu, **told}


def tell(**facts: object) -> None:
    """Print a line for `fresh`: the facts, and the most bytes that were resident in this process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sys.stdout.write(json.dumps({"peak": int(status["VmHWM"].split()[0]) << 10, **facts}) + "\n")
    sys.stdout.flush()
