"""Pictures in a table with labelled sides."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm.image.table import EMPTY, GAP, MOST_LINES, TableWriter, table, wrap

COLOURS = ("red", "lime", "blue", "cyan", "magenta", "yellow")
STEPS, SCALE = ("steps", ("10", "20", "50")), ("scale", ("3", "7.5"))


def plain(*colours, size=(40, 30)):
    return [colour and Image.new("RGB", size, colour) for colour in colours]


def places(canvas: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) that a colour fills."""
    where = (np.asarray(canvas) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(axis=2)
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert where.sum() == (box[2] - box[0]) * (box[3] - box[1]), "it is no rectangle"
    return tuple(map(int, box))


def test_each_picture_is_whole_in_its_row_and_column():
    boxes = [places(table(plain(*COLOURS), STEPS, SCALE), colour) for colour in COLOURS]
    left, top = boxes[0][:2]
    assert boxes == [(left + (40 + GAP) * (k % 3), top + (30 + GAP) * (k // 3),
                      left + (40 + GAP) * (k % 3) + 40, top + (30 + GAP) * (k // 3) + 30) for k in range(6)]


def test_the_labels_stand_beside_what_they_name_and_differ():
    canvas = table(plain(*COLOURS), STEPS, SCALE)
    ink = np.asarray(canvas.convert("L")) < 128
    left, top = places(canvas, "red")[:2]
    lower = top + 30 + GAP
    heads = [ink[:top, left + k * 44:left + k * 44 + 40] for k in range(3)]
    assert all(head.any() for head in heads)
    assert not np.array_equal(heads[0], heads[1])
    assert ink[top:lower, :left].any()
    assert ink[lower:lower + 30, :left].any()
    assert ink[:top, :left].any()  # the name of the side
    assert not np.array_equal(ink, np.asarray(table(plain(*COLOURS), STEPS, ("eta", SCALE[1])).convert("L")) < 128)


def test_one_side_alone_is_a_row_without_a_margin_on_its_left():
    canvas = table(plain(*COLOURS[:3]), STEPS)
    assert places(canvas, "red")[0] == GAP
    assert places(canvas, "lime")[1] == places(canvas, "red")[1]


def test_a_picture_that_failed_leaves_a_grey_cell_and_sizes_may_differ():
    images = [*plain("red", size=(20, 30)), *plain("lime", size=(40, 10)), None]
    canvas = table(images, STEPS)
    (left, top, _, bottom), (lime, over, *_), (grey, above, right, below) = (
        places(canvas, colour) for colour in ("red", "lime", EMPTY))
    assert (bottom - top, over - top, above, below) == (30, 10, top, bottom)
    assert (lime - left, grey - lime, right - grey) == (44 - 10, 44, 40)


def test_a_table_of_pictures_that_all_failed_is_a_table():
    assert table([None, None, None], STEPS).width > 3 * 64


def test_too_few_pictures_are_no_table():
    with pytest.raises(ValueError, match="a table of 3 by 2 needs as many pictures, got 1"):
        table(plain("red"), STEPS, SCALE)


def test_a_long_label_takes_lines_that_fit_and_is_cut_off():
    font = ImageFont.load_default(12)
    words = wrap("a fox in the deep snow of a long winter night", font, 90)
    assert words.replace("\n", " ") == "a fox in the deep snow of a long winter night"
    assert all(font.getlength(line) <= 90 for line in words.splitlines())
    long = wrap("x" * 300, font, 60).splitlines()
    assert len(long) == MOST_LINES
    assert long[-1].endswith("…")
    assert wrap("", font, 60) == ""
    assert wrap("wide", font, 1).splitlines()[0] == "w"


def test_a_table_is_saved_as_soon_as_it_is_full():
    saved = []
    writer = TableWriter(lambda canvas: saved.append(canvas) or f"{len(saved)}.png", [STEPS, SCALE])
    for colour in (*COLOURS, *COLOURS[:5]):
        writer.add(*plain(colour))
    assert writer.paths == ["1.png"]
    writer.add(None)
    writer.close()
    assert writer.paths == ["1.png", "2.png"]
    assert [places(canvas, "red") for canvas in saved] == [places(saved[0], "red")] * 2
    grey = Image.new("RGB", (1, 1), EMPTY).getpixel((0, 0))
    assert saved[1].crop(places(saved[0], "yellow")).getcolors() == [(40 * 30, grey)]


def test_a_table_that_would_be_too_large_has_smaller_pictures():
    saved = []
    writer = TableWriter(lambda canvas: saved.append(canvas), [STEPS, SCALE], max_pixels=6 * 20 * 15)
    for colour in COLOURS:
        writer.add(*plain(colour))
    left, top, right, bottom = places(saved[0], "red")
    assert (right - left, bottom - top) == (20, 15)
