import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import ImageError, RequestError
from ldm.generation.geometry import Geometry
from ldm.generation.inputs import Given, read_inputs
from ldm.generation.request import Request

TINY = Geometry(channels=4, factor=4, side=64, step=16)


def read(**settings):
    return read_inputs(Request(**settings), TINY)


def test_a_request_that_starts_from_nothing_has_a_size_alone():
    inputs = read(width=32)
    assert inputs.size == (32, 64)
    assert inputs.tensors(torch.device("cpu")) == Given(size=(32, 64))


def test_a_picture_keeps_its_size_in_whole_steps(photo, tmp_path, caplog):
    assert read(init_img=photo).size == (32, 32)
    assert caplog.text == ""
    Image.new("RGB", (50, 90)).save(tmp_path / "odd.png")
    with caplog.at_level(logging.WARNING):
        assert read(init_img=str(tmp_path / "odd.png")).size == (48, 80)
        read(init_img=str(tmp_path / "odd.png"))
    assert caplog.messages == [f"{tmp_path / 'odd.png'} is resized from 50x90 to 48x80"]


def test_a_size_that_is_asked_for_wins_over_that_of_the_picture(photo):
    assert read(init_img=photo, width=48).size == (48, 32)
    assert read(init_img=photo, height=64, width=16).size == (16, 64)
    with pytest.raises(RequestError, match="W must be a positive multiple of 16, got 50"):
        read(init_img=photo, width=50)


def test_tensors_are_in_the_range_that_models_are_trained_on(photo, mask):
    image, painted, *_ = read(init_img=photo, mask=mask).tensors(torch.device("cpu"))
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None]
    torch.testing.assert_close(image, pixels / 127.5 - 1)
    assert painted.shape == (1, 1, 32, 32)
    assert painted[..., :16].eq(1).all()
    assert painted[..., 16:].eq(0).all()


def test_what_is_not_repainted_is_put_back_from_the_picture(photo, mask):
    kept = np.asarray(read(init_img=photo, mask=mask).restore(Image.new("RGB", (32, 32), "red")))
    assert (kept[:, :16] == (255, 0, 0)).all()
    assert np.array_equal(kept[:, 16:], np.asarray(Image.open(photo))[:, 16:])
    red = Image.new("RGB", (32, 32), "red")
    assert read(init_img=photo).restore(red) is red


def test_a_mask_of_another_size_than_its_picture_is_resized_with_a_notice(photo, tmp_path, caplog):
    Image.new("L", (7, 5), 255).save(tmp_path / "small.png")
    with caplog.at_level(logging.WARNING):
        inputs = read(init_img=photo, mask=str(tmp_path / "small.png"))
    assert inputs.mask.size == (32, 32)
    assert "is not of the size of" in caplog.text


def test_a_mask_of_the_size_of_its_picture_follows_it_without_a_notice(tmp_path, caplog):
    Image.new("RGB", (50, 90)).save(tmp_path / "odd.png")
    Image.new("L", (50, 90), 255).save(tmp_path / "mask.png")
    with caplog.at_level(logging.WARNING):
        inputs = read(init_img=str(tmp_path / "odd.png"), mask=str(tmp_path / "mask.png"))
    assert inputs.mask.size == inputs.image.size == (48, 80)
    assert len(caplog.messages) == 1


def test_a_file_that_changes_is_read_again(photo):
    before = read(init_img=photo).image
    assert read(init_img=photo).image is before
    Image.new("RGB", (32, 32), "teal").save(photo)
    os.utime(photo, (1, 1))
    assert read(init_img=photo).image.getpixel((0, 0)) == (0, 128, 128)


def test_a_relative_path_is_of_the_folder_that_is_worked_in(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(init_img="photo.png").size == (32, 32)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other/photo.png")
    monkeypatch.chdir(tmp_path / "other")
    assert read(init_img="photo.png").size == (16, 16)


def test_a_picture_that_is_not_there_is_an_image_error(photo, tmp_path):
    with pytest.raises(ImageError, match="there is no picture"):
        read(init_img=str(tmp_path / "nowhere.png"))
    with pytest.raises(ImageError, match="there is no picture"):
        read(init_img=photo, mask=str(tmp_path / "nowhere.png"))
