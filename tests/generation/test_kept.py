"""One process loads a model once for all of its runs."""

import os
import shutil

import pytest
import torch
from tiny import write_model
from torch import nn

from ldm.generation.kept import Content, held, once
from ldm.generation.loading import choose, open_run
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.request import Request
from ldm.generation.rows import Row

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_kept():
    once({})
    yield
    once({})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def run(checkpoint, outdir, **options):
    model = ModelOptions(**({"ckpt": str(checkpoint), "precision": "full"} | options))
    rows = [Row(Request("a circle", steps=1))]
    return open_run(rows, model, RunOptions(str(outdir)), lambda event, **facts: None, choose(model))


def test_what_the_last_run_had_is_not_made_again_and_what_is_not_wanted_is_let_go():
    made = []

    def make(name: str):
        def model() -> nn.Module:
            made.append(name)
            return nn.Linear(2, 2)

        return model

    first, second = once({"a": make("a"), "b": make("b")})
    assert held(CPU) == 2 * 4 * (2 * 2 + 2)
    again, third = once({"b": make("b"), "c": make("c")})
    assert again is second
    assert third is not first
    once({"a": make("a")})
    assert made == ["a", "b", "c", "a"]


def test_a_copy_has_the_same_content_and_a_changed_file_another(tmp_path):
    file, copy = tmp_path / "model.ckpt", tmp_path / "copy.ckpt"
    file.write_bytes(b"weights")
    before = Content(file)
    shutil.copy(file, copy)
    assert Content(copy) == before
    copy.write_bytes(b"WEIGHTS")
    assert Content(copy) != before
    os.utime(file, ns=(1, 1))
    assert Content(file) != before  # what it held when it was read cannot be told any more


def test_a_folder_has_the_content_of_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    empty = Content(folder)
    (folder / "unet.safetensors").write_bytes(b"weights")
    assert Content(folder) != empty
    assert Content(folder) == Content(folder)


def test_two_scripts_in_one_process_share_the_model(checkpoint, tmp_path):
    first, second = (run(checkpoint, tmp_path / name).pipeline.model for name in "ab")
    assert second is first


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"use_ema": False}, {"memory": "low"}])
def test_a_model_that_is_to_be_loaded_otherwise_is_loaded_anew(checkpoint, tmp_path, options):
    first = run(checkpoint, tmp_path).pipeline.model
    assert run(checkpoint, tmp_path, **options).pipeline.model is not first


def test_where_memory_is_short_nothing_is_kept(checkpoint, tmp_path):
    run(checkpoint, tmp_path)
    run(checkpoint, tmp_path, memory="lowest")
    assert not held(CPU)


def test_the_memory_of_a_kept_model_counts_as_free(checkpoint, tmp_path, monkeypatch):
    left = {"bytes": 1 << 40}
    monkeypatch.setattr("ldm.memory.free_memory", lambda device: left["bytes"])
    first = run(checkpoint, tmp_path)
    monkeypatch.setattr("ldm.memory.WORKING_SPACE", 0)
    left["bytes"] = 0  # all that there was is the model's
    second = run(checkpoint, tmp_path)
    assert second.recorder.how["memory"] == "auto"
    assert second.pipeline.model is first.pipeline.model
