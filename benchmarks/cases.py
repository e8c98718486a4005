"""What is measured: each case a pair of sides, what it is about, and the ratio that is to be reached."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing
from benchmarks.weights import Files


@dataclass(frozen=True)
class Settings:
    """files: the weights; rounds: of A-B-B-A; steps: of the pictures that are drawn whole; scratch: for them."""

    files: Files
    rounds: int
    steps: int
    scratch: Path


@dataclass(frozen=True)
class Measured:
    """Both sides' runs, and how far apart their outputs are, max|a - b| / max|b|, where they have comparable ones."""

    ours: Timing
    theirs: Timing
    difference: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    ours, theirs: "tool precision" each, or what else the two sides are; goal: the ratio of seconds, ours by theirs, and
    peak_goal that of memory, to be reached.
    """

    name: str
    ours: str
    theirs: str
    what: str
    run: Callable[["Case", Settings], Measured]
    goal: float | None = None
    peak_goal: float | None = None
    options: tuple[Any, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}: {self.ours} by {self.theirs}"


def every() -> list[Case]:
    """All cases, in the order of the table."""
    from benchmarks import networks, programs

    return [*networks.CASES, *programs.CASES]
