"""A run: requests into batches, batches into files. A batch that fails takes no other with it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.errors import LdmError, OutOfMemory, RequestError
from ldm.generation.events import Tell, telling
from ldm.generation.finish import Finished, Finisher
from ldm.generation.noise import NoiseSource
from ldm.generation.options import RunOptions
from ldm.generation.pipeline import OnStep, Picture, Pipeline
from ldm.generation.preview import Preview, fit_colours
from ldm.generation.record import OF_A_PICTURE, Recorder, Replay
from ldm.generation.request import Request
from ldm.generation.rows import Row
from ldm.image.grid import GridWriter
from ldm.image.io import Outdir, check_outdir, write_png

logger = logging.getLogger(__name__)

PREVIEW = "preview.png"  # in the output folder, the one file that is written over


@dataclass
class Summary:
    """How many pictures were made and how many could not be."""

    made: int = 0
    failed: int = 0

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


def batches(rows: Sequence[Row], batch_size: int, n_iter: int) -> Iterator[list[Request]]:
    """Go n_iter times through the rows, in batches of neighbours whose settings are the same.

    With seed_mode "image" the k-th picture of the run gets seed + k, and a row with a seed of its own that, and in
    the rounds after the first the next ones.
    """
    made = 0
    for number in range(n_iter):
        batch: list[Request] = []
        for row in rows:
            request = row.request
            if batch and (len(batch) == batch_size or settings(request) != settings(batch[0])):
                yield batch
                batch = []
            if request.seed_mode == "image":
                request = replace(request, seed=request.seed + (number if row.seeded else made))
            batch.append(request)
            made += 1
        if batch:
            yield batch


def settings(request: Request) -> Request:
    """The request without what the pictures of one batch may differ in."""
    same = {name: getattr(Request, name) for name in OF_A_PICTURE}
    if request.seed_mode == "run":
        del same["seed"]
    return replace(request, **same)


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

    def draw(self, rows: Sequence[Row]) -> Summary:
        """Draw every row into samples/, and the pictures of the run into a grid."""
        outdir = Outdir(self.options.outdir)

        def save_grid(canvas: Image.Image) -> Path:
            path = outdir.grids.save(self.finish.mark(canvas)[0])
            self.tell("saved", path=path, kind="grid")
            return path

        def keep(made: Finished, info: PngInfo) -> None:
            if not self.options.skip_save:
                self._saved(outdir.samples.save(made.image, info), made)
            if not self.options.skip_grid:
                grids.add(made.unmarked)

        grids = GridWriter(save_grid, self.options.n_rows or self.options.batch_size)
        plan = batches(rows, self.options.batch_size, self.options.n_iter)
        return self._draw(plan, keep, at_the_end=grids.close)

    def draw_files(self, names: Mapping[Request, str]) -> Summary:
        """Draw each request into the output folder, under the name that it is given."""
        folder = check_outdir(self.options.outdir)
        if self.options.preview and PREVIEW in names.values():
            raise RequestError(f"a picture here is to be named {PREVIEW}, as the preview is: leave --preview out")

        def keep(made: Finished, info: PngInfo) -> None:
            path = folder / names[made.request]
            if not path.exists():  # else another run has made it in the meantime
                self._saved(write_png(path, made.image, info), made)

        return self._draw(([request] for request in names), keep)

    def redraw(self, replay: Replay) -> Summary:
        """Draw the batch of a recorded picture again, from the same noise, and write that picture into samples/."""
        outdir = Outdir(self.options.outdir)
        if replay.noise:
            self.noise.of(replay.requests).repeat(replay.noise)
        return self._draw(
            [replay.requests], lambda made, info: self._saved(outdir.samples.save(made.image, info), made), replay.index
        )

    def _saved(self, path: Path, made: Finished) -> None:
        self.tell("saved", path=path, kind="picture", **asked(made.request))

    def _watch(self, bar: tqdm, preview: Preview | None, batch: int, steps: int) -> OnStep:
        """What is done after each step of a batch."""
        numbers = count(1)

        def on_step(x: Tensor, x0: Tensor) -> None:
            step = next(numbers)
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
        plan: Iterable[Sequence[Request]],
        keep: Callable[[Finished, PngInfo], None],
        only: int | None = None,
        at_the_end: Callable[[], None] = lambda: None,
    ) -> Summary:
        """Draw batch after batch and `keep` their pictures, or the one at index `only`.

        What cannot be drawn is told before the first step. A batch or a picture that fails is logged and counted;
        OutOfMemory and OutputError, which would come again, end the run.
        """
        plan, summary = list(plan), Summary()
        for request in dict.fromkeys(chain.from_iterable(plan)):
            self.pipeline.check(request)
        steps = [len(self.pipeline.path(batch[0]).levels) - 1 for batch in plan]
        total = sum(len(batch) for batch in plan) if only is None else 1
        preview = self._preview()
        wordy = logger.isEnabledFor(logging.INFO)
        # With None there is no bar where stderr is no terminal.
        with (
            telling(self.tell, summary, pictures=total, batches=len(plan), steps=sum(steps),
                    outdir=self.options.outdir),
            tqdm(total=sum(steps), unit="step", disable=None if wordy else True) as bar,
            logging_redirect_tqdm(),
        ):
            for number, (batch, walk) in enumerate(zip(plan, steps, strict=True), 1):
                wanted = range(len(batch)) if only is None else [only]
                noise = self.noise.of(batch)
                before = deepcopy(noise.history)
                self.tell("batch", batch=number, of=len(plan), steps=walk, pictures=[asked(batch[i]) for i in wanted])
                logger.debug("batch %d of %d: %d pictures, %s, %d steps, seed %d", number, len(plan), len(batch),
                             batch[0].sampler, walk, batch[0].seed)
                try:
                    pictures = self.pipeline.generate(batch, noise, self._watch(bar, preview, number, walk))
                except OutOfMemory:
                    raise
                except LdmError as error:
                    logger.error("%s: %s", describe(batch[0]), error)
                    for index in wanted:
                        self.tell("failed", error=str(error), **asked(batch[index]))
                    summary.failed += len(wanted)
                    continue
                for index in wanted:
                    if isinstance(pictures[index], Picture):
                        made = self.finish(pictures[index])
                        keep(made, self.recorder.png_info(made, batch, index, before))
                        summary.made += 1
                    else:
                        logger.error("%s: %s", describe(batch[index]), pictures[index])
                        self.tell("failed", error=str(pictures[index]), **asked(batch[index]))
                        summary.failed += 1
            at_the_end()
        return summary


def describe(request: Request) -> str:
    """A request in a few words, for a message."""
    return repr(request.prompt) if request.prompt else request.init_img or "a picture"


def asked(request: Request) -> dict[str, Any]:
    """What tells a request from the others of its batch, for an event."""
    return {name: getattr(request, name) for name in OF_A_PICTURE}
