"""--lora and --embedding, from the command line to the files, and back by --replay."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.image.io import read_image
from ldm.image.metadata import read_record

SETTINGS = ("--ddim_steps", 2, "--n_iter", 1, "--n_samples", 1, "--skip_grid", "--watermark", "off", "--safety", "off",
            "--device", "cpu", "--precision", "full")  # fmt: skip
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def txt2img(script, models):
    def run(*options: object, kind: str = "text"):
        return script("txt2img", "--prompt", "a fox and <cat>", "--ckpt", models[kind], *SETTINGS, *options)

    return run


@pytest.fixture
def lora(tmp_path):
    numbers = torch.Generator().manual_seed(0)
    state = {f"{Q}.lora_{end}.weight": torch.randn(shape, generator=numbers)
             for end, shape in (("down", (4, 128)), ("up", (128, 4)))}
    save_file(state, tmp_path / "style.safetensors")
    return "style.safetensors"


@pytest.fixture
def embedding(tmp_path):
    torch.save({"<cat>": 3 * torch.ones(2, 64)}, tmp_path / "cat.bin")
    return "cat.bin"


def written(outcome) -> bytes:
    assert outcome.code == 0, outcome.err
    return Path(outcome.out[0]).read_bytes()


def pixels(outcome) -> bytes:
    assert outcome.code == 0, outcome.err
    return read_image(outcome.out[0]).tobytes()


@pytest.mark.parametrize("options", [["--lora", "style.safetensors"], ["--embedding", "cat.bin"]], ids=["lora", "word"])
def test_an_adapter_changes_the_picture(txt2img, lora, embedding, options):
    assert pixels(txt2img()) != pixels(txt2img(*options))


def test_a_weight_of_nothing_changes_no_pixel(txt2img, lora):
    assert pixels(txt2img()) == pixels(txt2img("--lora", f"{lora}:0"))


def test_the_record_tells_each_file_and_replay_makes_the_same_file_again(txt2img, lora, embedding):
    outcome = txt2img("--lora", f"{lora}:0.5", f"{lora}:-0.2", "--embedding", f"{embedding}:fox")
    told = read_record(outcome.out[0])["run"]
    assert [(entry["file"], entry["weight"], len(entry["sha256"])) for entry in told["lora"]] == [
        (lora, 0.5, 64), (lora, -0.2, 64)]
    assert [(entry["file"], entry["words"], len(entry["sha256"])) for entry in told["embedding"]] == [
        (embedding, ["fox"], 64)]
    again = txt2img("--replay", outcome.out[0])
    assert written(again) == written(outcome)
    assert not [line for line in again.err if "differ" in line]


def test_replay_does_without_a_file_that_is_gone_and_says_so(txt2img, lora, embedding, tmp_path):
    plain = txt2img()
    outcome = txt2img("--lora", f"{lora}:0.5", "--embedding", embedding)
    (tmp_path / lora).unlink()
    (tmp_path / embedding).write_bytes(b"something else")
    again = txt2img("--replay", outcome.out[0])
    assert pixels(again) == pixels(plain) != pixels(outcome)
    told = [line for line in again.err if "differ" in line]
    assert len(told) == 2
    assert told[0].startswith("the picture was made with the LoRA style.safetensors (weight 0.5, sha256 ")
    assert told[0].endswith("which is not at hand: it will differ; name the file with --lora")
    assert told[1].startswith("the picture was made with the embedding cat.bin (<cat>, sha256 ")


def test_replay_finds_a_file_that_has_moved_by_the_option(txt2img, lora, tmp_path):
    outcome = txt2img("--lora", f"{lora}:0.5")
    shutil.move(tmp_path / lora, tmp_path / "moved.safetensors")
    again = txt2img("--replay", outcome.out[0], "--lora", "moved.safetensors:0.5")
    assert pixels(again) == pixels(outcome)
    assert not [line for line in again.err if "differ" in line]
    other = txt2img("--replay", outcome.out[0], "--lora", "moved.safetensors")
    assert any("made without the LoRA moved.safetensors (weight 1.0" in line for line in other.err)


@pytest.mark.parametrize("script_name, options", [
    ("img2img", ["--init-img", "photo.png", "--strength", 0.5]),
    ("inpaint", ["--init-img", "photo.png", "--mask", "mask.png"]),
])  # fmt: skip
def test_the_other_scripts_take_them_too(script, models, photo, mask, lora, embedding, script_name, options):
    common = (script_name, "--prompt", "a <cat>", "--ckpt", models["text"], *SETTINGS, *options)
    plain = pixels(script(*common))
    assert pixels(script(*common, "--lora", lora)) != plain
    assert pixels(script(*common, "--embedding", embedding)) != plain


def test_a_lora_of_the_networks_alone_goes_into_an_unconditional_model(script, models, tmp_path):
    key = "model.diffusion_model.middle_block.1.qkv"
    state = {f"{key}.lora_down.weight": torch.ones(2, 64), f"{key}.lora_up.weight": torch.ones(192, 2)}
    save_file(state, tmp_path / "plain.safetensors")
    common = ("-r", models["unconditional"], "-n", 1, "-c", 2, "-e", 0, "--skip_grid", "--watermark", "off",
              "--safety", "off", "--precision", "full", "--device", "cpu")  # fmt: skip
    plain = pixels(script("sample_diffusion", *common))
    assert pixels(script("sample_diffusion", *common, "--lora", "plain.safetensors")) != plain


@pytest.mark.parametrize("options, code, message", [
    (["--lora", "nowhere.safetensors:0.5"], 3, "there is no LoRA file nowhere.safetensors"),
    (["--lora", "style.safetensors:nan"], 2, "the weight of a LoRA must be a finite number, got 'style.safet"),
    (["--lora", "style.safetensors:much"], 3, "there is no LoRA file style.safetensors:much"),
    (["--embedding", "nowhere.pt"], 3, "there is no embedding file nowhere.pt"),
    (["--embedding", "style.safetensors"], 3, "style.safetensors holds no embedding"),
    (["--lora", "cat.bin"], 3, "cat.bin holds no LoRA, but the weights of textual inversion"),
    (["--embedding", "cat.bin", "cat.bin:<CAT>"], 2, "both bring the word '<CAT>'"),
])  # fmt: skip
def test_what_cannot_be_used_is_told_in_one_line(txt2img, lora, embedding, options, code, message):
    outcome = txt2img(*options)
    assert outcome.code == code
    assert message in outcome.err[-1]
    assert not any("Traceback" in line for line in outcome.err)


def test_no_words_go_into_a_model_that_reads_none(script, models, embedding):
    outcome = script("sample_diffusion", "-r", models["unconditional"], "-n", 1, "-c", 2, "--embedding", embedding)
    assert outcome.code == 2
    assert "this model reads no text" in outcome.err[-1]


@pytest.mark.parametrize("config", [True, False], ids=["with a config", "without one"])
def test_an_adapter_in_the_place_of_the_model_names_its_option(txt2img, models, lora, embedding, config):
    named = ("--config", models["text"].with_name("config.yaml")) if config else ()
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 64)}}, "learned.pt")
    for file, option in ((lora, "--lora"), (embedding, "--embedding"), ("learned.pt", "--embedding")):
        done = txt2img("--ckpt", file, *named)
        assert (done.code, f"{option} FILE" in done.said) == (3, True)
        assert "name its YAML" not in done.said
