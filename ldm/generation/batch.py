"""A run: rows into batches, batches into files. A row that fails takes no other with it."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.errors import LdmError, OutOfMemory, RequestError
from ldm.generation.background import Background, Interrupt
from ldm.generation.events import Tell, telling
from ldm.generation.finish import Finisher
from ldm.generation.gallery import Drawn, Gallery, Part, asked, tell_saved
from ldm.generation.noise import NoiseSource
from ldm.generation.options import INTERRUPTED, RunOptions
from ldm.generation.pipeline import OnStep, Picture, Pipeline
from ldm.generation.plan import Job, plan, rounds, settings
from ldm.generation.preview import Preview, fit_colours
from ldm.generation.record import Recorder, Replay
from ldm.generation.request import Request
from ldm.generation.rows import Row, check_rows
from ldm.image.io import Outdir
from ldm.memory import lowest

logger = logging.getLogger(__name__)

PREVIEW = "preview.png"  # in the output folder, the one file that is written over


@dataclass
class Summary:
    """How many pictures were made and how many could not be."""

    made: int = 0
    failed: int = 0
    interrupted = False  # no field: events tell the counts alone

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        return 1 if self.failed else 0


class Run:
    """Draws batches and writes pictures, grids and their metadata under the output folder.

    `tell` is called with each event (ldm.generation.events): `saved` for a file as soon as it is there.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: RunOptions,
        finish: Finisher,
        recorder: Recorder,
        tell: Tell,
    ):
        self.pipeline = pipeline
        self.options = options
        self.finish = finish
        self.recorder = recorder
        self.tell = tell
        self.noise = NoiseSource(pipeline.model.device)
        self._steps: dict[Request, int] = {}

    def draw(self, rows: Sequence[Row]) -> Summary:
        """Draw every row into samples/, and the pictures of the run into a grid."""
        options, pictures = self.options, len(rows) * self.options.n_iter
        gallery = Gallery(options, self.finish, self.recorder, self.tell, pictures)
        return self._fill(gallery, lambda: plan(rows, options.batch_size, options.n_iter), pictures)

    def draw_files(self, names: Mapping[Request, str]) -> Summary:
        """Draw each request into the output folder, under the name that it is given."""
        if self.options.preview and PREVIEW in names.values():
            raise RequestError(f"a picture here is to be named {PREVIEW}, as the preview is: leave --preview out")
        options = replace(self.options, skip_grid=True)
        gallery = Gallery(options, self.finish, self.recorder, self.tell, len(names), list(names.values()))
        batches = [[Job(index, request, name)] for index, (request, name) in enumerate(names.items())]
        return self._fill(gallery, lambda: iter(batches), len(names))

    def _fill(self, gallery: Gallery, batches: Callable[[], Iterator[list[Job]]], pictures: int) -> Summary:
        """Draw the batches of a run of so many pictures, those that are left of it, into a gallery."""
        self._go_on(gallery, batches())
        steps = [self._walk(batch) for batch in batches()]
        parts = (part for batch in batches() for part in gallery.parts(batch))
        with gallery:
            return self._draw(parts, gallery.keep, (pictures, len(steps), sum(steps)), gallery.pass_by, gallery.close)

    def follow(self, arrivals: Iterable[list[Row]]) -> Summary:
        """As `draw`, for rows that come while it goes on (`Arrivals`), each drawn n_iter times before the next.

        A row that cannot be drawn fails, and the others go on. To go on with an earlier run, all are waited for first.
        """
        options = self.options
        gallery = Gallery(options, self.finish, self.recorder, self.tell, 0)

        def batches(arrivals: Iterable[list[Row]]) -> Iterator[list[Job]]:
            first = 0
            for found in arrivals:
                rows = rounds(list(map(self._checked, found)), options.n_iter)
                yield from plan(rows, options.batch_size, 1, first) if rows else [[]]
                first += len(rows)

        if options.go_on:
            arrivals = [list(chain.from_iterable(arrivals))]
            self._go_on(gallery, batches(arrivals))
        parts = (part for batch in batches(arrivals) for part in gallery.parts(batch))
        with gallery:
            return self._draw(parts, gallery.keep, (None, None, None), gallery.pass_by, gallery.close)

    def _checked(self, row: Row) -> Row:
        """The row, with an error if this model cannot draw it."""
        try:
            check_rows([replace(row, place="")], self.pipeline.check)
        except RequestError as error:
            return replace(row, error=str(error))
        return row

    def _go_on(self, gallery: Gallery, batches: Iterable[list[Job]]) -> None:
        """Let the gallery go on with the earlier run of these batches, if that is asked for."""
        if self.options.go_on:
            jobs = sorted(chain.from_iterable(batches), key=lambda job: job.index)
            if not gallery.go_on(jobs):
                logger.warning("%s has no run of these rows to go on with: this is a new one", self.options.outdir)

    def redraw(self, replay: Replay) -> Summary:
        """Draw the batch of a recorded picture again, from the same noise, and write that picture into samples/."""
        samples = Outdir(self.options.outdir).samples
        batch = [Job(index, request) for index, request in enumerate(replay.requests)]

        def keep(drawn: Drawn) -> None:
            if isinstance(drawn.outcome, Picture):
                self._write(drawn, samples.save)

        part = Part(batch, [batch[replay.index]], before=replay.noise)
        return self._draw([part], keep, (1, 1, self._walk(batch)))

    def _write(self, drawn: Drawn, save: Callable[..., Path]) -> None:
        made = self.finish(drawn.outcome)
        info = self.recorder.png_info(made, drawn.requests, drawn.batch.index(drawn.job), drawn.before, drawn.how)
        tell_saved(self.tell, save(made.image, info, made.depth), made)

    def _walk(self, batch: Sequence[Job]) -> int:
        """How many steps a batch takes."""
        alike = settings(batch[0].request)
        if alike not in self._steps:
            self._steps[alike] = self.pipeline.moves(alike)
        return self._steps[alike]

    def _watch(self, bar: tqdm, preview: Preview | None, batch: int, steps: int) -> OnStep:
        """What is done after each step of a batch."""
        numbers = count(1)

        def on_step(x: Tensor, x0: Tensor) -> None:
            step = next(numbers)
            self.recorder.hash()  # not before, when it would hold up the first step
            bar.update()
            self.tell("step", batch=batch, step=step, of=steps)
            if preview:
                preview(step, x0)

        return on_step

    def _preview(self) -> Preview | None:
        """The preview that the options ask for."""
        if not self.options.preview:
            return None
        model, geometry = self.pipeline.model, self.pipeline.geometry
        path = Path(self.options.outdir) / PREVIEW
        return Preview(path, self.options.preview, lambda: fit_colours(model, geometry), geometry.factor)

    def _draw(
        self,
        parts: Iterable[Part],
        keep: Callable[[Drawn], None],
        totals: tuple[int, int, int] | tuple[None, None, None],
        pass_by: Callable[[Job], None] = lambda job: None,
        close: Callable[[], None] = lambda: None,
    ) -> Summary:
        """Draw part after part, and `keep` what was wanted of each while the next one is drawn.

        totals: of pictures, batches and steps, as far as they are known. A part without jobs waits for what was drawn
        to be written. A picture that fails is logged and counted; OutputError, which would come again, ends the run.
        """
        summary, preview, last, numbers = Summary(), self._preview(), None, count(1)
        pictures, batches, steps = totals
        wordy = logger.isEnabledFor(logging.INFO)

        def finish(drawn: Drawn) -> None:
            keep(drawn)
            summary.made += isinstance(drawn.outcome, Picture)

        # With None there is no bar where stderr is no terminal.
        with (
            telling(self.tell, summary, pictures=pictures, batches=batches, steps=steps, outdir=self.options.outdir),
            tqdm(total=steps, unit="step", disable=None if wordy else True) as bar,
            logging_redirect_tqdm(),
            Interrupt() as interrupt,
            Background() as background,
        ):
            for part in parts:
                background.check()
                if not part.jobs:
                    background.wait()
                    continue
                for job in part.done:
                    background.do(pass_by, job)
                first, walk, number = part.jobs[0].request, self._walk(part.jobs), next(numbers)
                if not part.wanted:
                    if part.after is not None and first.seed_mode == "run":
                        self.noise.of([first]).reach(part.after)
                    bar.update(walk)
                    continue
                interrupt.busy = True
                if not part.jobs[0].error:
                    self.tell("batch", batch=number, of=batches, steps=walk,
                              pictures=[asked(job.request) for job in part.wanted])
                logger.debug("batch %d of %s: %d pictures, %s, %d steps, seed %d", number, batches or "?",
                             len(part.jobs), first.sampler, walk, first.seed)
                watch = partial(self._watch, bar, preview, number, walk)
                for drawn in self._sample(part.jobs, part.before, watch):
                    if drawn.job not in part.wanted:
                        continue
                    if isinstance(drawn.outcome, LdmError):
                        if drawn.outcome is not last:  # once for a batch that failed as a whole
                            logger.error("%s: %s", describe(drawn.job), drawn.outcome)
                        last = drawn.outcome
                        self.tell("failed", error=str(drawn.outcome), row=drawn.job.place, **asked(drawn.job.request))
                        summary.failed += 1
                    background.do(finish, drawn)
                interrupt.busy = False
                summary.interrupted = interrupt.asked
                if interrupt.asked or (summary.failed and self.options.stop_on_error):
                    break
            else:
                background.wait()
                close()
        return summary

    def _sample(
        self,
        jobs: Sequence[Job],
        before: list[list[int]] | None,
        watch: Callable[[], OnStep],
        how: Mapping[str, str] | None = None,
    ) -> Iterator[Drawn]:
        """Draw jobs together; where the memory does not hold them, in halves, and one alone with the least of it.

        before: the history that the noise is brought to first. how: the settings in place of the run's. Raises
        OutOfMemory where the memory does not hold one picture that is not a row of a file: then it holds none of the
        others, either.
        """
        if jobs[0].error:
            yield from (Drawn(job, RequestError(job.error), [job], [], [], 0.0) for job in jobs)
            return
        requests = [job.request for job in jobs]
        noise, begun = self.noise.of(requests), time.monotonic()
        if before is not None:
            noise.reach(before)
        before = deepcopy(noise.history)
        try:
            outcomes = self.pipeline.generate(requests, noise, watch())
        except LdmError as error:
            failed = type(error)(*error.args)  # without the traceback, which holds on to the batch's memory
        else:
            seconds, after = (time.monotonic() - begun) / len(jobs), deepcopy(noise.history)
            for job, outcome in zip(jobs, outcomes, strict=True):
                yield Drawn(job, outcome, jobs, before, after, seconds, how or {})
            return
        noise.reach(before)
        if not isinstance(failed, OutOfMemory):
            for job in jobs:
                yield Drawn(job, failed, jobs, before, before, 0.0)
        elif len(jobs) > 1:
            half = len(jobs) // 2
            halves = chain(self._sample(jobs[:half], None, watch), self._sample(jobs[half:], None, watch))
            for index, drawn in enumerate(halves):
                if not index and isinstance(drawn.outcome, Picture):
                    logger.warning("%s: it was enough for %d", failed, len(drawn.batch))
                yield drawn
        elif how is None and (usual := self.recorder.how["memory"]) != "lowest":
            logger.warning("%s: trying with --memory lowest", failed)
            with ExitStack() as lowered:
                for model in self.pipeline.loaded:
                    lowered.enter_context(lowest(model, usual))
                yield from list(self._sample(jobs, None, watch, {"memory": "lowest"}))
        else:
            failed = OutOfMemory(f"{failed}, and --memory lowest is all that can be saved: make it smaller, or try "
                                 "--precision bf16")
            if not jobs[0].place:
                raise failed
            yield Drawn(jobs[0], failed, jobs, before, before, 0.0)


def describe(job: Job) -> str:
    """A picture in a few words, for a message."""
    request = job.request
    what = repr(request.prompt) if request.prompt else request.init_img or "a picture"
    return f"{job.place}, {what}" if job.place else what
