"""The whole recipe of the shapes world in a few steps a stage: from nothing to a folder that the scripts run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.load import load_model

ROOT = Path(__file__).parent.parent.parent
SHAPES = ROOT / "configs" / "shapes"
SMALL = {
    "autoencoder": {"data": {"params": {"batch_size": 2, "validation": {"params": {"n": 1}}}},
                    "lightning": {"trainer": {"devices": 1, "strategy": "auto"}}},
    "autoencoder-whole": {"data": {"params": {"batch_size": 1}}, "lightning": {"trainer": {"max_steps": 2}}},
    "autoencoder-fine": {},
    "clip": {"data": {"params": {"batch_size": 4, "validation": {"params": {"n": 4}}}}},
    "clip-pictures": {},
    "latent": {
        "data": {"params": {"batch_size": 2, "train": {"params": {"source": {"params": {"n": 4}}}},
                            "validation": {"params": {"source": {"params": {"n": 2}}}}}},
        "lightning": {"trainer": {"devices": 1, "strategy": "auto"},
                      "callbacks": {"exact_score": {"params": {"n": 2, "steps": 2}},
                                    "image_logger": {"params": {"disabled": True}}}},
    },
    "latent-redrawn": {
        "data": {"params": {"batch_size": 2, "train": {"params": {"steps": 2, "source": {"params": {"n": 4}}}}}},
    },
    "latent-guided": {},
}  # fmt: skip
QUICK = {"lightning": {"trainer": {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for name, changes in SMALL.items():
        shipped = OmegaConf.load(SHAPES / f"{name}.yaml")
        OmegaConf.save(OmegaConf.merge(shipped, QUICK, changes), folder / f"{name}.yaml")
    command = [sys.executable, ROOT / "scripts" / "train_shapes.py", "--configs", folder, "--work", folder / "work",
               "--out", folder / "out", "--accelerator", "cpu", "--enable_progress_bar", "false"]
    done = subprocess.run(map(str, command), cwd=ROOT, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(folder / "out"))
    return folder


def test_the_folder_holds_every_part_in_half_precision_and_is_small_enough(made):
    out = made / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "model.safetensors", "config.yaml", "clip/config.json", "clip/vocab.json", "clip/merges.txt",
        "clip/model.safetensors"}  # fmt: skip
    assert (out / "model.safetensors").stat().st_size <= 30e6


@torch.no_grad()
def test_the_folder_is_loaded_from_where_it_lies_and_the_model_draws_at_its_size(made, monkeypatch):
    monkeypatch.chdir("/")
    assert "version: clip\n" in (made / "out" / "config.yaml").read_text()
    model = load_model(made / "out" / "config.yaml", made / "out" / "model.safetensors")
    assert type(model).__name__ == "LatentDiffusion"
    cond = model.get_learned_conditioning(["a small red ring on a blue background"])
    assert cond.shape == (1, 20, 128)
    latents, _ = model.sample_log(cond, 1, True, 2, eta=0.0)
    assert model.decode_first_stage(latents).shape == (1, 3, 256, 256)


def test_the_exact_score_is_in_the_log_of_the_run(made):
    (table,) = made.glob("work/*_latent/csv/*/metrics.csv")
    assert {"val/exact", "val/exact_shape", "val/loss_simple_ema"} <= set(table.read_text().splitlines()[0].split(","))
