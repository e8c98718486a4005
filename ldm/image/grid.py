"""Many pictures on one canvas, laid out as torchvision's make_grid does with its defaults."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

logger = logging.getLogger(__name__)

PADDING = 2  # black pixels between the pictures and around them
MAX_PIXELS = 2**26  # of one grid file: 200 MB of colour, and few enough that Pillow opens it without a warning


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row, `columns` a row or fewer if there are fewer, the last row filled up with black.

    A single picture is its own grid, without a border.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"pictures of one grid must have one size, got {sorted({image.size for image in images})}")
    if len(images) == 1:
        return images[0].copy()
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (side + PADDING for side in images[0].size)
    canvas = Image.new("RGB", (columns * width + PADDING, rows * height + PADDING))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        canvas.paste(image, (column * width + PADDING, row * height + PADDING))
    return canvas


class GridWriter:
    """Gathers the pictures of a run and saves them as a grid of `columns`, at `close` or when one grid is full.

    `save` takes the canvas and returns its path; `paths` are those so far. A grid is full at `max_pixels`, so a run
    of any length holds no more pictures than fit on one canvas; it also ends where pictures of another size follow.
    """

    def __init__(self, save: Callable[[Image.Image], Path], columns: int, max_pixels: int = MAX_PIXELS):
        if columns < 1:
            raise ValueError(f"a grid needs at least one column, got {columns}")
        self.paths: list[Path] = []
        self._save = save
        self._columns = columns
        self._max_pixels = max_pixels
        self._images: list[Image.Image] = []

    def add(self, image: Image.Image | None) -> None:
        """Take the next picture, None where it failed. Saves the grid before it if that is full."""
        if image is None:
            return
        if self._images:
            _, room = self._layout()
            if len(self._images) == room:
                logger.warning("a grid is full at %d pictures of %dx%d; the next ones go into another",
                               room, *self._images[0].size)
            if len(self._images) == room or image.size != self._images[0].size:
                self.close()
        self._images.append(image)

    def close(self) -> None:
        """Save the grid of the pictures that have come since the last one, if there are any."""
        if self._images:
            columns, _ = self._layout()
            self.paths.append(self._save(grid(self._images, columns)))
            self._images.clear()

    def _layout(self) -> tuple[int, int]:
        """The columns of the canvas, and how many pictures go on it in whole rows."""
        width, height = (side + PADDING for side in self._images[0].size)
        cells = max(1, self._max_pixels // (width * height))
        columns = min(self._columns, cells)
        return columns, cells // columns * columns
