import json

import pytest
from PIL import Image, PngImagePlugin

from ldm.errors import ImageError, RequestError
from ldm.generation.finish import Finished
from ldm.generation.record import HOW, PACKAGES, Recorder, Replay, installed_versions
from ldm.generation.request import Request
from ldm.image.metadata import read_parameters, read_record

RUN = dict.fromkeys(HOW) | {"device": "cpu", "precision": "full", "watermark": "", "safety": "off"}


@pytest.fixture
def recorded(tmp_path):
    """Write a picture with its record, and give its path: recorded(request, ..., index=1)."""
    (tmp_path / "weights.ckpt").write_bytes(b"abc")

    def write(*batch, index=0, noise=(), change=lambda record: record):
        image = Image.new("RGB", (8, 16))
        made = Finished(image, batch[index], "dwtDct", "passed", "and a dog")
        recorder = Recorder(tmp_path / "config.yaml", tmp_path / "weights.ckpt", RUN)
        info = PngImagePlugin.PngInfo()
        path = tmp_path / "picture.png"
        image.save(path, pnginfo=recorder.png_info(made, batch, index, list(noise)))
        with Image.open(path) as written:
            for name, text in written.info.items():
                info.add_text(name, json.dumps(change(json.loads(text))) if name == "ldm" else text)
        image.save(path, pnginfo=info)
        return path

    return write


def test_other_tools_read_the_settings_of_the_picture_itself(recorded):
    path = recorded(Request(prompt="a"), Request(prompt="a fox", negative_prompt="snow", sampler="ddim", eta=0.5,
                                                 seed=7, init_img="a.png", strength=0.4), index=1)
    assert read_parameters(path) | {
        "Prompt": "a fox", "Negative prompt": "snow", "Steps": "50", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "7",
        "Size": "8x16", "Model hash": "ba7816bf8f", "Model": "weights", "Denoising strength": "0.4", "Eta": "0.5",
    } == read_parameters(path)  # fmt: skip
    assert "Denoising strength" not in read_parameters(recorded(Request(strength=0.4)))


def test_the_record_says_what_was_done_to_the_picture_and_by_which_versions(recorded):
    record = read_record(recorded(Request()))
    assert record["made"] == {"watermark": "dwtDct", "safety": "passed", "cut": "and a dog"}
    assert record["model"]["checkpoint"] == "weights.ckpt"
    assert record["model"]["sha256"].startswith("ba7816bf8f01cfea414140de5dae2223")
    assert record["versions"] == installed_versions()
    assert {"ldm", *PACKAGES} == set(record["versions"])


def test_a_record_is_read_back_whole(recorded):
    batch = (Request(prompt="a", seed=3, class_label=1), Request(prompt="b", seed=4, class_label=2))
    replay = Replay.read(recorded(*batch, index=1, noise=[[2, 4, 8, 8, 3]]))
    assert (replay.requests, replay.index, replay.noise) == (batch, 1, [[2, 4, 8, 8, 3]])
    assert replay.how | RUN == replay.how
    assert (replay.checkpoint, replay.sha256[:10]) == ("weights.ckpt", "ba7816bf8f")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {},
        lambda record: record | {"batch": {}},
        lambda record: record | {"batch": record["batch"] | {"index": 5}},
        lambda record: record | {"batch": record["batch"] | {"requests": []}},
        lambda record: record | {"batch": record["batch"] | {"noise": [["many"]]}},
        lambda record: record | {"run": {"device": "cpu"}},
        lambda record: record | {"model": None},
        lambda record: record | {"request": record["request"] | {"steps": "fifty"}},
        lambda record: record | {"batch": record["batch"] | {"requests": [{"prompt": 5}]}},
    ],
)
def test_a_record_that_lacks_something_is_an_error_and_no_surprise_later(recorded, change):
    with pytest.raises(ImageError, match=r"the record in .*picture\.png is not complete"):
        Replay.read(recorded(Request(), change=change))


def test_a_record_with_settings_that_do_not_exist_here_names_them(recorded):
    with pytest.raises(RequestError, match="does not know the settings sharpness"):
        Replay.read(recorded(Request(), change=lambda record: record | {"request": {"sharpness": 1}}))


def test_a_picture_without_a_record_says_so(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ImageError, match="carries no record of its making"):
        Replay.read(tmp_path / "plain.png")
