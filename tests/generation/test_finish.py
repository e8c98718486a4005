import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.errors import CheckpointError
from ldm.generation.finish import Finisher
from ldm.generation.options import RunOptions
from ldm.generation.pipeline import Picture
from ldm.generation.request import Request
from ldm.image.watermark import read_watermark
from ldm.modules.encoders.clip import ClipConfig
from ldm.safety import SafetyChecker, SafetyNetwork

NOISE = Image.fromarray(np.random.default_rng(0).normal(128, 8, (256, 256, 3)).clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def no_checker_at_hand(monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.safety.FOLDER", tmp_path / "nothing")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def checker(flags: bool) -> SafetyChecker:
    """A tiny checker that flags every picture, or none."""
    torch.manual_seed(0)
    network = SafetyNetwork(ClipConfig(width=32, layers=1, heads=2, ff=32, image=28, patch=14), embed=8)
    nn.init.constant_(network.concept_embeds_weights, -2.0 if flags else 2.0)
    nn.init.constant_(network.special_care_embeds_weights, 2.0)
    return SafetyChecker(network)


def test_a_picture_is_marked_and_what_was_done_to_it_told():
    finished = Finisher(RunOptions(safety="off"))(Picture(NOISE, Request(prompt="a fox"), "and a dog"))
    assert read_watermark(finished.image).method == finished.watermark
    assert (finished.request.prompt, finished.safety, finished.cut) == ("a fox", "", "and a dog")


def test_without_a_watermark_a_picture_is_left_as_it_is():
    finished = Finisher(RunOptions(watermark="", safety="off"))(Picture(NOISE, Request()))
    assert finished.image is NOISE
    assert finished.watermark is None


def test_why_there_is_no_watermark_is_said_once(caplog):
    finish = Finisher(RunOptions(safety="off"))
    small = Image.new("RGB", (64, 64))
    for _ in range(3):
        assert finish(Picture(small, Request())).image is small
    finish(Picture(Image.new("RGB", (32, 32)), Request()))
    assert caplog.messages == [f"no watermark: {size} is under 256x256 pixels" for size in ("64x64", "32x32")]


def test_a_checker_that_is_asked_for_must_be_at_hand():
    with pytest.raises(CheckpointError, match="safety-checker"):
        Finisher(RunOptions(safety="blur"))


def test_a_checker_that_is_not_asked_for_is_missed_once_and_only_in_the_log(caplog):
    finish = Finisher(RunOptions(safety="auto", watermark=""))
    with caplog.at_level(logging.INFO):
        assert [finish(Picture(NOISE, Request())).safety for _ in range(2)] == ["", ""]
    assert caplog.messages == ["no safety checker: its weights are not at hand"]


@pytest.mark.parametrize(
    ("action", "told"), [("flag", "flagged, flag"), ("blur", "flagged, blur"), ("black", "flagged, black")]
)
def test_what_is_done_to_a_flagged_picture_is_told_in_the_log_and_the_record(caplog, action, told):
    finish = Finisher(RunOptions(safety="off", watermark=""))
    finish.action, finish.checker = action, checker(flags=True)
    finished = finish(Picture(NOISE, Request()))
    assert finished.safety == told
    assert len(caplog.messages) == 1
    pixels = np.asarray(finished.image)
    assert (pixels.max() == 0) == (action == "black")
    assert (finished.image is NOISE) == (action == "flag")


def test_a_picture_that_passes_is_never_changed(caplog):
    finish = Finisher(RunOptions(safety="off", watermark=""))
    finish.action, finish.checker = "black", checker(flags=False)
    finished = finish(Picture(NOISE, Request()))
    assert (finished.image is NOISE, finished.safety, caplog.messages) == (True, "passed", [])


@pytest.mark.parametrize(("action", "kept"), [("flag", True), ("blur", False), ("black", False)])
def test_the_depth_of_a_picture_that_may_not_be_seen_is_left_out(action, kept):
    finish = Finisher(RunOptions(safety="off", watermark=""))
    finish.action, finish.checker = action, checker(flags=True)
    depth = Image.new("I;16", NOISE.size)
    assert (finish(Picture(NOISE, Request(), depth=depth)).depth is depth) == kept
