"""scripts/fetch_model.py, as a command, against a hub on this machine."""

import os

import pytest
from hub import serving

from ldm.download import MODELS

ALIAS = "v2.0-inpainting"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_a_model_is_fetched_to_its_usual_place_and_the_path_is_printed(command, hub, tmp_path):
    weights = os.urandom(5000)
    hub.files[f"{MODELS[ALIAS].repos[0]}/512-inpainting-ema.ckpt"] = weights
    run = command("fetch_model", ALIAS, "--root", tmp_path)
    assert run.returncode == 0, run.stderr
    place = tmp_path / "models" / "ldm" / "stable-diffusion-v2-inpainting" / "model.ckpt"
    assert run.stdout == f"{place}\n"
    assert place.read_bytes() == weights
    assert "HTTP" not in run.stderr


def test_the_folder_above_models_is_the_working_one_if_it_has_such_a_folder(command, hub, tmp_path):
    hub.files[f"{MODELS[ALIAS].repos[0]}/512-inpainting-ema.ckpt"] = b"weights"
    (tmp_path / "models").mkdir()
    run = command("fetch_model", ALIAS)
    assert run.stdout == "models/ldm/stable-diffusion-v2-inpainting/model.ckpt\n", run.stderr


def test_the_list_is_a_line_a_model_and_tells_which_are_there(command, tmp_path):
    folder = tmp_path / MODELS["v1.5"].folder
    folder.mkdir(parents=True)
    (folder / "v1-5-pruned-emaonly.ckpt").touch()
    rows = [line.split("\t") for line in command("fetch_model", "--list").stdout.splitlines()]
    assert [row[0] for row in rows] == list(MODELS)
    assert {row[0] for row in rows if row[-1] == "there"} == {"v1.5"}


def test_what_cannot_be_had_is_one_line_and_exits_with_3(command, hub, tmp_path):
    run = command("fetch_model", "v1.4", "--root", tmp_path)
    assert run.returncode == 3
    assert run.stderr.count("\n") == 1
    assert "there is no CompVis/stable-diffusion-v-1-4-original on the hub" in run.stderr
    hub.files["CompVis/stable-diffusion-v-1-4-original/sd-v1-4.ckpt"] = b"not the published one"
    run = command("fetch_model", "v1.4", "--root", tmp_path)
    assert run.returncode == 3
    assert "has another sd-v1-4.ckpt than the one that was published" in run.stderr


@pytest.mark.parametrize("options", [[], ["v9"], ["--unknown"]])
def test_wrong_usage_exits_with_2(options, command):
    run = command("fetch_model", *options)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
