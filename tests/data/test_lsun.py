"""Pictures that a text file lists."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.lsun import LSUNBase, LSUNChurchesTrain, LSUNChurchesValidation
from ldm.errors import RequestError
from ldm.util import instantiate_from_config


@pytest.fixture
def churches(tmp_path, monkeypatch):
    """One picture, red on its left half and blue on its right, wider than it is high."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "lsun" / "churches"
    folder.mkdir(parents=True)
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    for name in ("church_outdoor_train.txt", "church_outdoor_val.txt"):
        (folder.parent / name).write_text("a.png\n\n")


def test_the_original_s_places_are_read_and_the_middle_square_is_kept(churches):
    (item,) = (LSUNChurchesValidation(size=4)[i] for i in range(1))
    assert item["image"].shape == (4, 4, 3)
    np.testing.assert_array_equal(item["image"][0, 0], [1, -1, -1])
    assert item["relative_file_path_"] == "a.png"
    assert item["file_path_"] == "data/lsun/churches/a.png"


def test_pictures_are_mirrored_as_often_as_asked(churches):
    np.testing.assert_array_equal(LSUNChurchesTrain(size=4, flip_p=1.0)[0]["image"][0, 0], [-1, -1, 1])
    np.testing.assert_array_equal(LSUNChurchesTrain(size=4, flip_p=0.0)[0]["image"][0, 0], [1, -1, -1])


def test_without_a_size_the_square_keeps_its_own(churches):
    assert LSUNChurchesTrain()[0]["image"].shape == (8, 8, 3)


def test_one_s_own_pictures_are_listed_by_their_paths(churches):
    Path("mine.txt").write_text("data/lsun/churches/a.png\n")
    params = {"size": 8, "training_images_list_file": "mine.txt"}
    item = instantiate_from_config({"target": "taming.data.custom.CustomTrain", "params": params})[0]
    np.testing.assert_array_equal(item["image"][0], [[1, -1, -1]] * 4 + [[-1, -1, 1]] * 4)


def test_a_missing_or_empty_list_says_so(tmp_path):
    with pytest.raises(RequestError, match="no list of pictures"):
        LSUNBase(str(tmp_path / "x.txt"), "data")
    (tmp_path / "x.txt").write_text("\n")
    with pytest.raises(RequestError, match="is empty"):
        LSUNBase(str(tmp_path / "x.txt"), "data")
    with pytest.raises(RequestError, match="interpolation"):
        LSUNBase(str(tmp_path / "x.txt"), "data", interpolation="cubic")
