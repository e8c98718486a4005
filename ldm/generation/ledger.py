"""What became of each picture of the runs in a folder: one line of JSON each in manifest.jsonl, from which a run that
ended early goes on."""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.errors import OutputError
from ldm.generation.inputs import fingerprint
from ldm.generation.record import Recorder
from ldm.generation.request import Request

logger = logging.getLogger(__name__)

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Entry:
    """One picture that was made, or could not be (`error`).

    row: where it was read. settings: their hash. batch: the pictures that it was drawn with. before, after: the
    `Noise.history` around that batch. file: its name in samples/, or in the output folder itself where the run is
    one of `named` pictures. depth: that of its depth map, where there is one.
    """

    index: int
    row: str
    settings: str
    seed: int
    batch: list[int]
    before: list[list[int]]
    after: list[list[int]]
    seconds: float = 0.0
    file: str | None = None
    sha256: str | None = None
    depth: str | None = None
    depth_sha256: str | None = None
    watermark: str | None = None
    safety: str = ""
    cut: str = ""
    error: str | None = None


@dataclass
class Past:
    """A run as its lines tell it. Its pictures are numbered from `first`, or `named`, its grids from `first_grid`."""

    run: str
    first: int
    first_grid: int
    pictures: int
    named: bool = False
    ended: bool = False
    entries: dict[int, Entry] = field(default_factory=dict)
    grids: dict[int, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The first number after those that it has taken for itself, for as long as it has not ended."""
        return 0 if self.ended else self.first + self.pictures


class Ledger:
    """The manifest of an output folder. Any number of runs may write into it at once."""

    def __init__(self, outdir: Path):
        self.path = outdir / NAME

    def begin(self, pictures: int, above: int, above_grid: int, named: bool = False) -> Past:
        """A new run. Its numbers follow the highest present, `above`, and those of runs that have not ended.

        Where two begin at once, the order of their lines decides.
        """
        run = uuid.uuid4().hex[:12]
        self.append(run=run, began=time.strftime("%Y-%m-%dT%H:%M:%S%z"), pictures=pictures, above=above,
                    above_grid=above_grid, named=named)
        return self.read()[run]

    def append(self, **line: Any) -> None:
        """Write a line, whole, and wait until it is on the disk. Raises OutputError."""
        try:
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    torn = file.read(1) != b"\n"  # by a run that was killed in the middle of a line
                else:
                    torn = False
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error

    def read(self) -> dict[str, Past]:
        """The runs so far, by name, in their order; lines that do not parse are passed over."""
        runs: dict[str, Past] = {}
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        take(json.loads(line), runs)
                    except (ValueError, KeyError, TypeError, AttributeError):
                        logger.debug("%s has a line that does not parse", self.path)
        except FileNotFoundError:
            return runs
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror}") from error
        return runs

    def find(self, settings: Sequence[str]) -> Past | None:
        """The run to go on with: the latest of those with the most pictures of these settings, by index, or None."""
        best, score = None, 0.0
        for past in self.read().values():
            if past.named:
                continue
            # One that was stopped before its first picture is better than none.
            empty = 0.5 if not past.entries and past.pictures == len(settings) and not past.ended else 0.0
            same = sum(entry.settings == settings[index] for index, entry in past.entries.items()
                       if index < len(settings))
            if max(same, empty) and max(same, empty) >= score:
                best, score = past, max(same, empty)
        return best


    def names(self, names: Sequence[str]) -> Past | None:
        """A run that goes on with what the latest lines say of the pictures of these names, or None."""
        of_file = {entry.file: entry for past in self.read().values() if past.named for entry in past.entries.values()}
        entries = {index: replace(of_file[name], index=index, batch=[index])
                   for index, name in enumerate(names) if name in of_file}
        return replace(self.begin(0, -1, -1, named=True), entries=entries) if entries else None


def take(line: dict[str, Any], runs: dict[str, Past]) -> None:
    """Add what a line says to the runs before it."""
    run = line.pop("run")
    if "began" in line:
        taken = [past for past in runs.values() if past.end]
        runs[run] = Past(
            run,
            max([line["above"] + 1, *(past.end for past in taken)]),
            max([line["above_grid"] + 1, *(past.first_grid + 1 for past in taken)]),
            line["pictures"],
            line.get("named", False),
        )
    elif "ended" in line:
        runs[run].ended = True
    elif "grid" in line:
        runs[run].grids[int(line["grid"])] = Path(line["file"]).name
    else:
        entry = Entry(**{one.name: line[one.name] for one in fields(Entry) if one.name in line})
        runs[run].entries[int(entry.index)] = entry


def settings_hash(request: Request, recorder: Recorder) -> str:
    """A hash of all that makes a picture what it is: its request, its input pictures, the model and how it is run."""
    facts = {
        "request": asdict(request),
        "files": [input_hash(path, fingerprint(path)) for path in (request.init_img, request.mask, request.depth_img)
                  if path],
        "run": recorder.how,
        "model": recorder.sha256,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=64)
def input_hash(path: str, fingerprint: tuple | None) -> str | None:
    """As `file_hash`, once for as long as the file's fingerprint is the same."""
    return file_hash(Path(path))


def file_hash(path: Path) -> str | None:
    """The SHA-256 of a file, or None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
