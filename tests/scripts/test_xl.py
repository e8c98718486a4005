"""Stable Diffusion XL and its refiner through the scripts."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.image.metadata import read_record


@pytest.fixture
def run(script, models):
    """Run a script on the tiny base in two steps, without what needs larger pictures."""

    def run(name: str, *options: object, ckpt: str = "xl"):
        small = ("--ddim_steps", 2, "--sampler", "euler", "--watermark", "off", "--safety", "off", "--device", "cpu",
                 "--precision", "full", "--n_samples", 1, "--n_iter", 1, "--skip_grid", "--ckpt", models[ckpt])
        done = script(name, *small, *options)
        return done if done.code else np.array(Image.open(done.out[-1]))

    return run


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def plain(run, kept):
    """What the base draws for "a red fox"."""
    if not kept:
        kept["picture"] = run("txt2img", "--prompt", "a red fox")
    return kept["picture"]


def test_sizes_and_crop_are_by_default_those_of_the_picture(run, plain):
    sizes = ("--original_size", "64x64", "--crop", "0,0", "--target_size", "64x64")
    assert np.array_equal(plain, run("txt2img", "--prompt", "a red fox", *sizes))
    assert not np.array_equal(plain, run("txt2img", "--prompt", "a red fox", "--crop", "300,0"))


def test_weights_chunks_and_edits_of_the_prompt_are_read(run, plain):
    for prompt in ("a (red:1.5) fox", "a [red:blue:0.5] fox"):
        assert not np.array_equal(plain, run("txt2img", "--prompt_weights", "--prompt", prompt))
    chunks = ("--prompt_weights", "--long_prompt", "chunk")
    assert np.array_equal(plain, run("txt2img", *chunks, "--prompt", "a red fox"))
    assert not np.array_equal(plain, run("txt2img", *chunks, "--prompt", "a red fox " * 60))


def test_the_refiner_draws_the_last_steps_and_the_replay_finds_it(run, plain, models, tmp_path):
    fine = run("txt2img", "--prompt", "a red fox", "--refiner", models["refiner"], "--refine_from", 0.5,
               "--outdir", "fine")  # fmt: skip
    assert not np.array_equal(plain, fine)
    picture = tmp_path / "fine" / "samples" / "00000.png"
    record = read_record(picture)
    assert record["request"]["refine_from"] == 0.5
    assert record["run"]["refiner"][0]["file"] == str(models["refiner"])
    again = run("txt2img", "--replay", picture, "--outdir", "again")
    assert np.array_equal(again, fine)


def test_the_refiner_goes_over_a_picture_by_itself_and_is_told_how_good_it_is_to_be(run, photo):
    start = ("--init-img", photo, "--strength", 0.5, "--prompt", "a fox", "--ddim_steps", 4)
    fine, poor = (run("img2img", *start, "--aesthetic_score", score, ckpt="refiner") for score in (6, 1))
    assert np.array_equal(fine, run("img2img", *start, ckpt="refiner"))
    assert not np.array_equal(fine, poor)


def test_rows_have_sizes_of_their_own(run, tmp_path):
    rows = [{"prompt": "a fox"}, {"prompt": "a fox", "crop": "16,0"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("txt2img", "--from-file", tmp_path / "rows.jsonl", "--outdir", "rows", "--seed_mode", "image")
    records = [read_record(path)["request"]["crop"] for path in sorted((tmp_path / "rows" / "samples").iterdir())]
    assert records == [None, "16,0"]


@pytest.mark.parametrize(("options", "complaint"), [
    (["--aesthetic_score", 5], "not told of aesthetic_score: leave --aesthetic_score out"),
    (["--original_size", "64"], "original_size must be two whole numbers such as 1024x768"),
    (["--crop", "a,b"], "crop must be two whole numbers such as 0,128"),
    (["--refine_from", 2], "refine_from must be from 0.0 to 1.0, got 2.0"),
    (["--refiner", "gone.ckpt"], "no checkpoint at gone.ckpt"),
])  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(run, options, complaint):
    assert complaint in run("txt2img", "--prompt", "a fox", *options).said


@pytest.mark.parametrize(("name", "value", "complaint"), [
    ("channels", 8, "draws other latents"), ("linear_end", 0.02, "trained on other noise levels")])  # fmt: skip
def test_a_refiner_of_other_latents_or_levels_is_refused(run, models, tmp_path, name, value, complaint):
    config = OmegaConf.load(models["text"].with_name("config.yaml"))
    config.model.params[name] = value
    OmegaConf.save(config, tmp_path / "config.yaml")
    (tmp_path / "other.ckpt").symlink_to(models["text"])
    assert complaint in run("txt2img", "--prompt", "a fox", "--refiner", tmp_path / "other.ckpt").said


def test_a_model_that_is_told_no_sizes_says_so(run):
    assert "not told of crop" in run("txt2img", "--prompt", "a fox", "--crop", "0,0", ckpt="text").said


def test_it_is_not_written_as_a_folder(script, models):
    done = script("convert", models["xl"], "folder/", "--config", models["xl"].with_name("config.yaml"))
    assert "only Stable Diffusion 1 and 2 are written as folders here" in done.said


def test_lora_reaches_both_text_encoders_and_the_network(run, plain, tmp_path):
    layers = {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (64, 128),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": (128, 64),
    }
    seen = []
    for name, (rows, columns) in layers.items():
        save_file({f"{name}.lora_up.weight": torch.ones(rows, 1), f"{name}.lora_down.weight": torch.ones(1, columns),
                   f"{name}.alpha": torch.tensor(1.0)}, tmp_path / f"{name}.safetensors")  # fmt: skip
        seen.append(run("txt2img", "--prompt", "a red fox", "--lora", f"{tmp_path / name}.safetensors:0.05"))
        assert not np.array_equal(plain, seen[-1])
    assert not np.array_equal(seen[1], seen[2])


def test_a_learned_word_has_vectors_for_both_encoders(run, plain, tmp_path):
    save_file({"clip_l": torch.ones(2, 64), "clip_g": torch.ones(2, 64)}, tmp_path / "glow.safetensors")
    learned = run("txt2img", "--prompt", "a red fox", "--embedding", f"{tmp_path}/glow.safetensors:red")
    assert not np.array_equal(plain, learned)
