"""What scripts do around their own few lines."""

import logging
import os
from argparse import Namespace
from pathlib import Path

import pytest

from ldm.errors import ConfigError, ImageError, LdmError, NumericalError, OutOfMemory, RequestError, UnsafeCheckpoint
from ldm.generation.command import execute, mask_pairs, prefer, set_up, show
from ldm.generation.options import ModelOptions, RunOptions


@pytest.fixture(autouse=True)
def quiet_afterwards():
    loggers = [logging.getLogger(), logging.getLogger("ldm")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("too wide"), 2),
        (ImageError("no picture"), 2),
        (ConfigError("no config"), 3),
        (UnsafeCheckpoint("runs code"), 3),
        (NumericalError("nothing"), 1),
        (OutOfMemory("too large"), 4),
        (LdmError("something"), 1),
    ],
)
def test_what_we_know_to_go_wrong_is_one_line_and_its_exit_code(caplog, error, code):
    assert execute(raising(error)) == code
    assert caplog.messages == [str(error)]


def test_an_interruption_is_130_and_a_bug_keeps_its_traceback(caplog):
    assert execute(raising(KeyboardInterrupt())) == 130
    assert caplog.messages == ["interrupted; the pictures written so far are whole"]
    with pytest.raises(ZeroDivisionError):
        execute(raising(ZeroDivisionError()))
    assert execute(lambda: 0) == 0


@pytest.mark.parametrize(("verbosity", "level"), [(-1, logging.ERROR), (0, logging.INFO), (1, logging.DEBUG)])
def test_verbosity_is_for_this_project_and_leaves_others_at_their_warnings(verbosity, level):
    set_up(Namespace(verbosity=verbosity, offline=False))
    assert logging.getLogger("ldm.generation").getEffectiveLevel() == level
    assert logging.getLogger("transformers_and_others").getEffectiveLevel() == max(level, logging.WARNING)


def test_only_offline_keeps_libraries_from_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    set_up(Namespace(verbosity=0, offline=False))
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    set_up(Namespace(verbosity=0, offline=True))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_line_is_on_stdout_as_soon_as_it_is_shown(capsys, monkeypatch):
    show("out/00000.png")
    assert capsys.readouterr() == ("out/00000.png\n", "")
    monkeypatch.setattr("sys.stdout", None)  # what a shell leaves of it with >&-
    show("out/00001.png")
    assert capsys.readouterr().err == ""


def test_pairs_are_found_by_their_names_and_the_rest_of_a_folder_left_alone(tmp_path):
    for name in ("b.png", "b_mask.png", "a_mask.png", "a.png", "c.png", "mask.png", "d_mask.jpg"):
        (tmp_path / name).touch()
    assert mask_pairs(str(tmp_path)) == [(tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png") for name in "ab"]


def test_a_folder_without_pairs_or_no_folder_at_all_is_wrong_usage(tmp_path):
    with pytest.raises(RequestError, match="has no pair NAME"):
        mask_pairs(str(tmp_path))
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(RequestError, match="there is no folder"):
            mask_pairs(str(tmp_path / name))


def test_a_replay_takes_what_was_recorded_unless_the_command_line_says_otherwise():
    recorded = {"device": "cuda", "precision": "fp16", "use_ema": True, "watermark": "", "safety": "off"}
    assert prefer(ModelOptions(ckpt="mine.ckpt"), recorded) == ModelOptions(
        ckpt="mine.ckpt", device="cuda", precision="fp16", use_ema=True)
    assert prefer(ModelOptions(device="cpu", precision="full", use_ema=False), recorded) == ModelOptions(
        device="cpu", precision="full", use_ema=False)
    assert prefer(RunOptions(outdir="again"), recorded) == RunOptions(outdir="again", watermark="", safety="off")
    with pytest.raises(RequestError, match="safety must be one of"):
        prefer(RunOptions(), {"safety": "shred"})


def test_a_line_that_nobody_reads_is_told_once_and_stops_nothing(tmp_path, caplog, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs a device that is always full")
    with open(full, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        show("out/00000.png")
        show("out/00001.png")
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.messages[0]
