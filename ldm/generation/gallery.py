"""Where the pictures of a run go: numbered files, a grid of them all, and a line for each in the manifest."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from PIL import Image

from ldm.errors import LdmError, OutputError
from ldm.generation.axes import read_axes
from ldm.generation.events import Tell
from ldm.generation.finish import Finished, Finisher
from ldm.generation.ledger import Entry, Ledger, Past, file_hash, settings_hash
from ldm.generation.options import RunOptions
from ldm.generation.pipeline import Picture
from ldm.generation.plan import Job
from ldm.generation.record import OF_A_PICTURE, Recorder
from ldm.generation.request import Request
from ldm.image.depth import depth_path
from ldm.image.grid import GridWriter
from ldm.image.io import Outdir, read_image, write_png
from ldm.image.table import TableWriter

History = list[list[int]]


@dataclass(frozen=True)
class Part:
    """Pictures that are drawn together, and those of them that are `wanted`; `done` are there already.

    before, after: the history of their noise where it is known from an earlier run.
    """

    jobs: Sequence[Job]
    wanted: Sequence[Job]
    done: Sequence[Job] = ()
    before: History | None = None
    after: History | None = None


@dataclass(frozen=True)
class Drawn:
    """What became of a job, with whom it was drawn, and between which histories of the noise.

    how: the settings that it was drawn with in place of the run's.
    """

    job: Job
    outcome: Picture | LdmError
    batch: Sequence[Job]
    before: History
    after: History
    seconds: float
    how: Mapping[str, str] = field(default_factory=dict)

    @property
    def requests(self) -> list[Request]:
        return [job.request for job in self.batch]


class Gallery:
    """The files of one run of `pictures` pictures, in a folder where other runs may write too.

    names: of each picture in the output folder itself, in place of a number in samples/; a file of that name that no
    run has written is left as it is. Of the run that it goes on with, what is there and as it was left is kept.
    """

    def __init__(
        self,
        options: RunOptions,
        finish: Finisher,
        recorder: Recorder,
        tell: Tell,
        pictures: int,
        names: Sequence[str] = (),
    ):
        self.options = options
        self.finish = finish
        self.recorder = recorder
        self.tell = tell
        self.pictures = pictures
        self.names = names
        self.outdir = Outdir(options.outdir, "" if names else "samples")
        self.ledger = Ledger(self.outdir.path)
        self._resumed: Past | None = None
        sides = [(axis.name, axis.values) for axis in read_axes(options.xy)]
        self._grids: GridWriter | TableWriter = (
            TableWriter(self._save_grid, sides) if sides else
            GridWriter(self._save_grid, options.n_rows or options.batch_size)
        )
        self._next, self._waiting = 0, {}

    def go_on(self, jobs: Sequence[Job]) -> bool:
        """Find the run of these jobs that ended early; False where there is none."""
        if self.names:
            self._resumed = self.ledger.names(self.names)
        else:
            self._resumed = self.ledger.find([settings_hash(job.request, self.recorder) for job in jobs])
        return self._resumed is not None

    @cached_property
    def past(self) -> Past:
        """This run. A new one takes its numbers when its first picture is there to be written."""
        numbered = 0 if self.names or self.options.skip_save else self.pictures
        return self._resumed or self.ledger.begin(
            numbered, self.outdir.samples.highest(), self.outdir.grids.highest(), bool(self.names)
        )

    def parts(self, batch: Sequence[Job]) -> Iterator[Part]:
        """A batch of the plan, divided as an earlier run drew it, as far as that did. A batch of none is a part."""
        if self._resumed is None:
            yield Part(batch, batch)
            return
        jobs = {job.index: job for job in batch}
        entries = {index: self._resumed.entries[index] for index in jobs if index in self._resumed.entries}
        groups = {tuple(entry.batch): entry for entry in entries.values()}
        if set(chain.from_iterable(groups)) <= set(jobs):
            for indices, entry in groups.items():
                yield self._part([jobs.pop(index) for index in indices if index in jobs], entry)
        if jobs:
            yield self._part(list(jobs.values()))

    def _part(self, jobs: Sequence[Job], entry: Entry | None = None) -> Part:
        done = [job for job in jobs if self._is_done(job)]
        wanted = [job for job in jobs if job not in done]
        return Part(jobs, wanted, done, *((entry.before, entry.after) if entry else ()))

    def _is_done(self, job: Job) -> bool:
        entry = self.past.entries.get(job.index)
        if not entry and self._is_foreign(job):
            return True
        if not (entry and entry.file and entry.settings == settings_hash(job.request, self.recorder)):
            return False
        files = {entry.file: entry.sha256} | ({entry.depth: entry.depth_sha256} if entry.depth else {})
        return all(file_hash(self._path(name)) == sha256 for name, sha256 in files.items())

    def _is_foreign(self, job: Job) -> bool:
        """Whether the name of a picture is that of a file that no run has written."""
        return bool(self.names) and job.index not in self.past.entries and self._path(self.names[job.index]).exists()

    def _path(self, name: str) -> Path:
        return self.outdir.samples.folder / Path(name).name

    def keep(self, drawn: Drawn) -> None:
        """Write a picture and its line, or the line that says why there is none."""
        job, outcome = drawn.job, drawn.outcome
        entry = {
            "index": job.index,
            "row": job.place,
            "settings": settings_hash(job.request, self.recorder),
            "seed": job.request.seed,
            "batch": [one.index for one in drawn.batch],
            "before": drawn.before,
            "after": drawn.after,
            "seconds": round(drawn.seconds, 3),
        }
        if isinstance(outcome, LdmError):
            if not self.options.skip_save:
                self._record(Entry(**entry, error=str(outcome)))
            self._hang(job.index, None)
            return
        made = self.finish(outcome)
        if not self.options.skip_save and not self._is_foreign(job):
            info = self.recorder.png_info(made, drawn.requests, drawn.batch.index(job), drawn.before, drawn.how)
            try:
                path = self._save(job, made, info)
            except OutputError as error:
                with suppress(OutputError):  # on a full disk there may be no room for the line, either
                    self._record(Entry(**entry, error=str(error)))
                raise
            tell_saved(self.tell, path, made)
            depth = depth_path(path) if made.depth else None
            self._record(Entry(**entry, file=path.name, sha256=file_hash(path), depth=depth and depth.name,
                               depth_sha256=depth and file_hash(depth), watermark=made.watermark, safety=made.safety,
                               cut=made.cut))
        self._hang(job.index, made.image)

    def _save(self, job: Job, made: Finished, info) -> Path:
        before = self.past.entries.get(job.index)
        if before and before.file:
            path = self._path(before.file)
            if made.depth:
                write_png(depth_path(path), made.depth, info, overwrite=True)
            return write_png(path, made.image, info, overwrite=True)
        if self.names:
            return write_png(self._path(self.names[job.index]), made.image, info)
        number, spare = self.past.first + job.index, self.past.first + self.pictures
        return self.outdir.samples.save_as(number, spare, made.image, info, made.depth)

    def _record(self, entry: Entry) -> None:
        self.ledger.append(run=self.past.run, **asdict(entry))

    def pass_by(self, job: Job) -> None:
        """A picture that is there already."""
        if not self.options.skip_grid:
            self._hang(job.index, read_image(self._path(self.past.entries[job.index].file)))

    def _hang(self, index: int, image: Image.Image | None) -> None:
        """Into the grid, in the order of the plan's rows; None for a picture that failed."""
        if self.options.skip_grid:
            return
        self._waiting[index] = image
        while self._next in self._waiting:
            self._grids.add(self._waiting.pop(self._next))
            self._next += 1

    def _save_grid(self, canvas: Image.Image) -> Path:
        number, marked = len(self._grids.paths), self.finish.mark(canvas)[0]
        if number in self.past.grids:
            path = write_png(self.outdir.path / self.past.grids[number], marked, overwrite=True)
        else:
            path = self.outdir.grids.save_as(self.past.first_grid + number, self.past.first_grid + 1, marked)
        self.tell("saved", path=path, kind="grid")
        self.ledger.append(run=self.past.run, grid=number, file=path.name, sha256=file_hash(path))
        return path

    def close(self) -> None:
        """After the last picture: the grid, and the line that says that the run has come to its end."""
        self._grids.close()
        self.ledger.append(run=self.past.run, ended=True)

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # What keeps a run from going on frees the names that it has not used; Ctrl-C does not.
        if isinstance(error, LdmError) and "past" in vars(self):
            with suppress(OutputError):
                self.ledger.append(run=self.past.run, ended=False)


def tell_saved(tell: Tell, path: Path, made: Finished) -> None:
    """Tell of a picture's file, and of that of its depth where there is one."""
    tell("saved", path=path, kind="picture", **asked(made.request))
    if made.depth:
        tell("saved", path=depth_path(path), kind="depth", **asked(made.request))


def asked(request: Request) -> dict[str, object]:
    """What tells a request from the others of its batch, for an event."""
    return {name: getattr(request, name) for name in OF_A_PICTURE}
