"""The model that ships with the project: what it draws by itself, where nothing else is at hand."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from ldm.data.shapes import sample_caption
from ldm.evaluation.drawing import Studio, clip_of
from ldm.evaluation.shapes import score
from ldm.generation.loading import choose
from ldm.generation.options import REPOSITORY, SHIPPED, ModelOptions
from ldm.generation.request import Request
from ldm.image.io import read_image

FOLDER = (REPOSITORY / SHIPPED).parent
CAPTIONS = [str(sample_caption(Random(i), "all", pairs=i % 2)) for i in range(24)]  # one object, two, one ...
pytestmark = pytest.mark.skipif(not (REPOSITORY / SHIPPED).exists(), reason=f"there is no {SHIPPED}")


def test_it_draws_22_of_24_captions_right_in_every_attribute(tmp_path):
    model = ModelOptions(ckpt=str(REPOSITORY / SHIPPED), device="cpu")
    requests = [Request(prompt=caption, sampler="dpmpp_2m", steps=20) for caption in CAPTIONS]
    paths = Studio(model, choose(model), tmp_path, batch_size=8).draw("captions", requests)
    wrong = [caption for caption, path in zip(CAPTIONS, paths) if not score(read_image(path), caption).right]
    assert len(wrong) <= 2, wrong


def test_a_prompt_is_drawn_by_a_bare_command_from_any_folder(tmp_path):
    caption = "a large red circle on a blue background"
    options = ("--n_samples", 1, "--n_iter", 1, "--sampler", "dpmpp_2m", "--ddim_steps", 20, "--device", "cpu")
    command = [sys.executable, REPOSITORY / "scripts" / "txt2img.py", "--prompt", caption, *options]
    if (REPOSITORY / ModelOptions.ckpt).exists():
        command += ["--ckpt", REPOSITORY / SHIPPED]
    run = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert score(read_image(tmp_path / run.stdout.splitlines()[0]), caption).right
    assert "not learnt" not in run.stderr


def test_its_folder_is_whole_and_small(monkeypatch):
    monkeypatch.chdir("/")
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert files == {"README.md", "config.yaml", "model.safetensors", "clip/config.json", "clip/merges.txt",
                     "clip/model.safetensors", "clip/vocab.json"}  # fmt: skip
    assert (FOLDER / "model.safetensors").stat().st_size <= 30e6
    chosen = choose(ModelOptions(ckpt=str(FOLDER / "model.safetensors")))
    assert chosen.geometry.side == 256
    assert chosen.grammar is not None
    assert clip_of(chosen) == FOLDER / "clip"
    for line in (FOLDER / "config.yaml").read_text().splitlines():
        assert str(Path(REPOSITORY)) not in line
