"""Pictures in a table, two settings along its sides, with the values written beside them: an x/y plot."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.image.grid import MAX_PIXELS

GAP = 4  # pixels between the pictures, and between them and the text
SMALLEST, LARGEST = 12, 28  # letters, in pixels
MOST_LINES = 4  # of one label
PAPER, INK, EMPTY = "white", "black", "lightgrey"

# What stands along one side: the name of the setting, and its values.
Side = tuple[str, Sequence[str]]


def table(images: Sequence[Image.Image | None], across: Side, down: Side = ("", ("",))) -> Image.Image:
    """Pictures row by row, under the values of `across` and beside those of `down`; a missing one leaves a grey cell.

    Pictures of several sizes are centred in cells that hold the largest.
    """
    (name_across, columns), (name_down, rows) = across, down
    if len(images) != len(columns) * len(rows):
        raise ValueError(f"a table of {len(columns)} by {len(rows)} needs as many pictures, got {len(images)}")
    there = [image for image in images if image is not None] or [Image.new("RGB", (64, 64))]
    width, height = (max(sides) for sides in zip(*(image.size for image in there)))
    font = ImageFont.load_default(min(LARGEST, max(SMALLEST, min(width, height) // 20)))
    heads = [wrap(text, font, width) for text in columns]
    sides = [wrap(text, font, width) for text in rows]
    corner, title = wrap(name_down, font, width), wrap(name_across, font, len(columns) * (width + GAP))

    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        _, _, right, bottom = pen.multiline_textbbox((0, 0), text, font, align="center")
        return int(right) + 1, int(bottom) + 1

    left = max(size(text)[0] for text in (*sides, corner)) + 2 * GAP if any((*rows, name_down)) else GAP
    title_height, head_height = size(title)[1] + GAP, max(size(text)[1] for text in (*heads, corner)) + 2 * GAP
    top = title_height + head_height
    canvas = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(canvas)

    def write(text: str, x: float, y: float) -> None:
        w, h = size(text)
        pen.multiline_text((x - w / 2, y - h / 2), text, INK, font, align="center")

    write(title, left + len(columns) * (width + GAP) / 2, title_height / 2)
    write(corner, left / 2, title_height + head_height / 2)
    for column, text in enumerate(heads):
        write(text, left + column * (width + GAP) + width / 2, title_height + head_height / 2)
    for row, text in enumerate(sides):
        write(text, left / 2, top + row * (height + GAP) + height / 2)
    for index, image in enumerate(images):
        row, column = divmod(index, len(columns))
        x, y = left + column * (width + GAP), top + row * (height + GAP)
        if image is None:
            pen.rectangle((x, y, x + width - 1, y + height - 1), EMPTY)
        else:
            canvas.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
    return canvas


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Text in lines that are no wider than `width` pixels, broken between words if it can be, cut off with "…"."""
    lines, rest = [], " ".join(text.split())
    while rest:
        fits = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 0, fits + 1)
        end = space if space > 0 and fits < len(rest) else fits
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES - 1], lines[MOST_LINES - 1][:-1] + "…"]
    return "\n".join(lines)


class TableWriter:
    """Gathers the pictures of a run, in order, and saves each table as soon as it is full; None is one that failed.

    `save` takes the canvas and returns its path; `paths` are those so far. Pictures are scaled down where a table
    of them would have more than `max_pixels`.
    """

    def __init__(self, save: Callable[[Image.Image], Path], sides: Sequence[Side], max_pixels: int = MAX_PIXELS):
        self.paths: list[Path] = []
        self._save = save
        self._sides = sides
        self._cells = 1
        for _, values in sides:
            self._cells *= len(values)
        self._max_pixels = max_pixels
        self._images: list[Image.Image | None] = []
        self._scale: float | None = None

    def add(self, image: Image.Image | None) -> None:
        if image is not None:
            if self._scale is None:
                self._scale = min(1.0, (self._max_pixels / (self._cells * image.width * image.height)) ** 0.5)
            if self._scale < 1:
                image = image.resize([max(1, int(side * self._scale)) for side in image.size], Image.Resampling.LANCZOS)
        self._images.append(image)
        if len(self._images) == self._cells:
            self.paths.append(self._save(table(self._images, *self._sides)))
            self._images.clear()

    def close(self) -> None:
        """Leave out what is not full."""
        self._images.clear()
