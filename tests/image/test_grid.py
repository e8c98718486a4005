"""ldm.image.grid: the layout of torchvision's make_grid, and runs of any length in bounded memory."""

import numpy as np
import pytest
from PIL import Image

from ldm.image.grid import MAX_PIXELS, GridWriter, grid


def pictures(number: int, width: int = 5, height: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(1, 256, (height, width, 3), np.uint8)) for _ in range(number)]


class Shelf:
    """Keeps what a GridWriter saves, under the names of the shelf."""

    def __init__(self):
        self.canvases = []

    def save(self, canvas):
        self.canvases.append(canvas)
        return f"grid-{len(self.canvases) - 1:04}.png"


def test_a_grid_of_known_pixels():
    white = Image.new("RGB", (1, 1), "white")
    canvas = np.asarray(grid([white] * 3, columns=2))[..., 0]
    line, full, last = [0] * 8, [0, 0, 255, 0, 0, 255, 0, 0], [0, 0, 255, 0, 0, 0, 0, 0]
    assert canvas.tolist() == [line, line, full, line, line, last, line, line]


@pytest.mark.parametrize("columns", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("number", [2, 3, 6, 7])
def test_pictures_lie_row_by_row_with_two_black_pixels_around_each(number, columns):
    images = pictures(number, width=5, height=3)
    canvas = np.asarray(grid(images, columns)).copy()
    row = min(number, columns)
    assert canvas.shape == (-(-number // row) * 5 + 2, row * 7 + 2, 3)
    for i, image in enumerate(images):
        top, left = 2 + i // row * 5, 2 + i % row * 7
        assert np.array_equal(canvas[top:top + 3, left:left + 5], image)
        canvas[top:top + 3, left:left + 5] = 0
    assert not canvas.any()


def test_a_single_picture_is_its_own_grid_without_a_border():
    image, = pictures(1)
    canvas = grid([image], 4)
    assert np.array_equal(canvas, image)
    assert canvas is not image


def test_a_grid_of_nothing_or_of_several_sizes_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        grid([], 3)
    with pytest.raises(ValueError, match="one size"):
        grid([*pictures(1), *pictures(1, 4, 4)], 3)
    with pytest.raises(ValueError, match="at least one column"):
        GridWriter(Shelf().save, 0)


def test_the_writer_saves_one_grid_at_the_end(caplog):
    shelf, images = Shelf(), pictures(7)
    writer = GridWriter(shelf.save, 3)
    for image in images:
        writer.add(image)
    assert writer.paths == []
    writer.close()
    writer.close()
    assert writer.paths == ["grid-0000.png"]
    assert np.array_equal(shelf.canvases[0], grid(images, 3))
    assert caplog.text == ""


def test_a_writer_without_pictures_saves_nothing():
    writer = GridWriter(Shelf().save, 3)
    writer.close()
    assert writer.paths == []


def test_a_full_grid_is_saved_with_a_notice_and_the_next_one_begun(caplog):
    shelf, images = Shelf(), pictures(10)
    writer = GridWriter(shelf.save, 2, max_pixels=5 * (5 + 2) * (3 + 2))  # five pictures: two whole rows
    for i, image in enumerate(images):
        writer.add(image)
        assert len(writer.paths) == i // 4
    writer.close()
    assert writer.paths == ["grid-0000.png", "grid-0001.png", "grid-0002.png"]
    for canvas, start in zip(shelf.canvases, (0, 4, 8)):
        assert np.array_equal(canvas, grid(images[start:start + 4], 2))
    assert caplog.text.count("full at 4 pictures of 5x3") == 2


def test_a_run_that_just_fills_a_grid_gives_no_second_one(caplog):
    shelf = Shelf()
    writer = GridWriter(shelf.save, 2, max_pixels=4 * 7 * 5)
    for image in pictures(4):
        writer.add(image)
    writer.close()
    assert len(shelf.canvases) == 1
    assert caplog.text == ""


def test_more_columns_than_fit_become_fewer():
    shelf = Shelf()
    writer = GridWriter(shelf.save, 10**6, max_pixels=3 * 7 * 5)
    for image in pictures(5):
        writer.add(image)
    writer.close()
    assert [canvas.size for canvas in shelf.canvases] == [(3 * 7 + 2, 5 + 2), (2 * 7 + 2, 5 + 2)]


def test_pictures_larger_than_a_grid_are_saved_one_by_one():
    shelf, images = Shelf(), pictures(3)
    writer = GridWriter(shelf.save, 2, max_pixels=1)
    for image in images:
        writer.add(image)
    writer.close()
    assert all(np.array_equal(canvas, image) for canvas, image in zip(shelf.canvases, images))


def test_pictures_of_another_size_begin_another_grid():
    shelf, images = Shelf(), [*pictures(3), *pictures(2, 4, 6)]
    writer = GridWriter(shelf.save, 2)
    for image in images:
        writer.add(image)
    writer.close()
    assert np.array_equal(shelf.canvases[0], grid(images[:3], 2))
    assert np.array_equal(shelf.canvases[1], grid(images[3:], 2))


def test_the_largest_grid_can_be_opened_without_a_warning():
    # 12,000 of 512x512 in the default three columns: the sizes alone, from the same rule.
    shelf = []
    writer = GridWriter(lambda canvas: shelf.append(canvas.size), 3, max_pixels=MAX_PIXELS // 64**2)
    for image in [Image.new("RGB", (6, 6))] * 12000:
        writer.add(image)
    writer.close()
    assert len(shelf) > 1
    assert all(width * height * 64**2 < Image.MAX_IMAGE_PIXELS for width, height in shelf)
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
