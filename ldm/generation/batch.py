"""A run: requests into batches, batches into files. A batch that fails takes no other with it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ldm.errors import LdmError, OutOfMemory
from ldm.generation.finish import Finished, Finisher
from ldm.generation.noise import NoiseSource
from ldm.generation.options import RunOptions
from ldm.generation.pipeline import Pipeline
from ldm.generation.record import OF_A_PICTURE, Recorder, Replay
from ldm.generation.request import Request
from ldm.image.grid import GridWriter
from ldm.image.io import Outdir, write_png

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """How many pictures were made and how many could not be."""

    made: int = 0
    failed: int = 0

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


def batches(requests: Sequence[Request], batch_size: int, n_iter: int) -> Iterator[list[Request]]:
    """Go n_iter times through the requests, in batches of neighbours whose settings are the same.

    With seed_mode "image" the k-th picture of the run gets seed + k.
    """
    made = 0
    for _ in range(n_iter):
        batch: list[Request] = []
        for request in requests:
            if batch and (len(batch) == batch_size or settings(request) != settings(batch[0])):
                yield batch
                batch = []
            batch.append(replace(request, seed=request.seed + made) if request.seed_mode == "image" else request)
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

    `saved` is called with the path of each file as soon as it is there.
    """

    def __init__(self, pipeline: Pipeline, options: RunOptions, recorder: Recorder, saved: Callable[[Path], None]):
        self.pipeline = pipeline
        self.options = options
        self.recorder = recorder
        self.saved = saved
        self.outdir = Outdir(options.outdir)
        self.finish = Finisher(options)
        self.noise = NoiseSource(pipeline.model.device)

    def draw(self, requests: Sequence[Request]) -> Summary:
        """Draw every request into samples/, and the pictures of the run into a grid."""
        grids = GridWriter(self._save_grid, self.options.n_rows or self.options.batch_size)

        def keep(made: Finished, info: PngInfo) -> None:
            if not self.options.skip_save:
                self.saved(self.outdir.samples.save(made.image, info))
            if not self.options.skip_grid:
                grids.add(made.unmarked)

        summary = self._draw(batches(requests, self.options.batch_size, self.options.n_iter), keep)
        grids.close()
        return summary

    def draw_files(self, names: Mapping[Request, str]) -> Summary:
        """Draw each request into the output folder, under the name that it is given."""

        def keep(made: Finished, info: PngInfo) -> None:
            self.saved(write_png(self.outdir.path / names[made.request], made.image, info))

        return self._draw(([request] for request in names), keep)

    def redraw(self, replay: Replay) -> Summary:
        """Draw the batch of a recorded picture again, from the same noise, and write that picture into samples/."""
        if replay.noise:
            self.noise.of(replay.requests).repeat(replay.noise)
        return self._draw(
            [replay.requests], lambda made, info: self.saved(self.outdir.samples.save(made.image, info)), replay.index
        )

    def _draw(
        self, plan: Iterable[Sequence[Request]], keep: Callable[[Finished, PngInfo], None], only: int | None = None
    ) -> Summary:
        """Draw batch after batch and `keep` their pictures, or the one at index `only`.

        A batch that fails is logged and counted; OutOfMemory ends the run, since it would come again.
        """
        plan, summary = list(plan), Summary()
        steps = sum(len(self.pipeline.path(batch[0]).levels) - 1 for batch in plan)
        with tqdm(total=steps, unit="step", disable=None) as bar:
            for batch in plan:
                wanted = range(len(batch)) if only is None else [only]
                noise = self.noise.of(batch)
                before = deepcopy(noise.history)
                kept = 0
                try:
                    pictures = self.pipeline.generate(batch, noise, lambda x: bar.update())
                    for index in wanted:
                        made = self.finish(pictures[index])
                        keep(made, self.recorder.png_info(made, batch, index, before))
                        kept += 1
                except OutOfMemory:
                    raise
                except LdmError as error:
                    logger.error("%s: %s", describe(batch[0]), error)
                summary.made += kept
                summary.failed += len(wanted) - kept
        return summary

    def _save_grid(self, canvas: Image.Image) -> Path:
        path = self.outdir.grids.save(self.finish.mark(canvas)[0])
        self.saved(path)
        return path


def describe(request: Request) -> str:
    """A request in a few words, for a message."""
    return repr(request.prompt) if request.prompt else request.init_img or "a picture"
