"""scripts/inspect_model.py, as a command."""

import hashlib
import json

import torch


def test_a_checkpoint_is_told_in_lines_with_its_hash(command, models):
    run = command("inspect_model", models["text"])
    assert (run.returncode, run.stderr) == (0, "")
    digest = hashlib.sha256(models["text"].read_bytes()).hexdigest()
    assert run.stdout.splitlines()[0] == str(models["text"])
    assert f"{digest} ({digest[:10]})" in run.stdout
    assert "autoencoder      2,702,087" in run.stdout


def test_json_is_a_line_for_each_checkpoint_and_files_and_folders_agree(command, models, tmp_path):
    assert command("convert", models["text"], "folder").returncode == 0
    run = command("inspect_model", "--json", "--no-hash", models["text"], "folder")
    assert run.returncode == 0, run.stderr
    file, folder = map(json.loads, run.stdout.splitlines())
    assert file["sha256"] is None
    assert file["parameters"] == folder["parameters"]
    assert file["beside"] == {"global_step": "0"}
    assert folder["config"] == "folder"


def test_one_file_that_cannot_be_read_leaves_the_others_told(command, models, tmp_path):
    (tmp_path / "page.ckpt").write_text("<!doctype html>")
    run = command("inspect_model", "page.ckpt", models["text"], "--no-hash", "--json")
    assert run.returncode == 3
    assert "is a web page" in run.stderr
    assert len(run.stdout.splitlines()) == 1


def test_check_holds_the_weights_against_the_config_and_finds_what_is_not_finite(command, models, tmp_path):
    assert command("inspect_model", models["text"], "--no-hash", "--check").returncode == 0
    state = torch.load(models["text"])["state_dict"]
    state["model.diffusion_model.out.2.bias"][0] = torch.nan
    del state["first_stage_model.post_quant_conv.bias"]
    torch.save(state, tmp_path / "bad.ckpt")
    run = command("inspect_model", "bad.ckpt", "--no-hash", "--check", "--json", "--config",
                  models["text"].parent / "config.yaml")
    assert run.returncode == 1
    broken = json.loads(run.stdout)["broken"]
    assert broken[0] == "1 weights have numbers that are not finite: model.diffusion_model.out.2.bias"
    assert "1 weights missing: first_stage_model.post_quant_conv.bias" in broken[1]


def test_a_file_without_a_config_cannot_be_checked_against_one(command, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "own.ckpt")
    run = command("inspect_model", "own.ckpt", "--no-hash", "--check")
    assert run.returncode == 1
    assert "name its YAML with --config" in run.stdout
