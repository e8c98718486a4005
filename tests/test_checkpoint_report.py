"""A weights file tells what it is, and what is odd about it."""

import json
import struct
from collections import OrderedDict
from math import prod

import pytest
import safetensors.torch
import torch
from support import manifest
from tiny import write_model

from ldm.checkpoint import open_checkpoint
from ldm.checkpoint.report import Report, altered, inspect, lines, spoiled
from ldm.models.convert import convert

SIZES = {
    "sd-v1": {"UNet": 859_520_964, "autoencoder": 83_653_863, "text encoder": 123_060_480},
    "sd-v1-full-ema": {"UNet": 859_520_964, "autoencoder": 83_653_863, "text encoder": 123_060_480, "EMA": 859_520_964},
    "sd-v2-v": {"UNet": 865_910_724, "autoencoder": 83_653_863, "text encoder": 354_032_641},
    "sd-v2-depth": {"UNet": 865_913_604, "autoencoder": 83_653_863, "text encoder": 354_032_641,
                    "depth estimator": 123_146_985},
    "sdxl-base": {"UNet": 2_567_463_684, "autoencoder": 83_653_863, "text encoder": 817_720_321},
    "ldm-txt2img-1p4B": {"UNet": 872_300_484, "autoencoder": 83_653_863, "text encoder": 581_994_042},
}  # fmt: skip


def sparse(path, shapes):
    """A safetensors file with weights of these shapes at a byte each, which takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        kind, width = ("I64", 8) if name.endswith("position_ids") else ("F8_E4M3", 1)
        start, end = end, end + width * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in manifest(name).items()}


def report_on(path) -> Report:
    return inspect(open_checkpoint(path))


def odd(state, tmp_path, **beside) -> list[str]:
    """What is odd about a .ckpt file with these weights."""
    torch.save({"state_dict": state, **beside}, tmp_path / "model.ckpt")
    return report_on(tmp_path / "model.ckpt").odd


# ----------------------------------------------------------------------------------------------------------- what it is

@pytest.mark.parametrize("name", SIZES)
def test_the_parameters_of_each_part_of_a_published_model_are_counted(name, tmp_path):
    report = report_on(sparse(tmp_path / "model.safetensors", published(name)))
    assert {part: count for part, count in report.parameters.items() if part != "computed"} == SIZES[name]
    assert report.total == sum(count for part, count in SIZES[name].items() if part != "EMA")
    assert report.ema == ("ema" in name)


@pytest.mark.parametrize("name", ["sd-v1", "sd-v1-full-ema", "sd-v1-inpainting", "sd-v2-base", "sd-v2-inpainting",
                                  "sd-x4-upscaler", "sd-image-variations", "ldm-txt2img-1p4B"])
def test_nothing_is_odd_about_the_names_of_a_published_model(name, tmp_path):
    shapes = {key: shape for key, shape in published(name).items() if not key.endswith("position_ids")}
    assert report_on(sparse(tmp_path / "model.safetensors", shapes)).odd == []


def test_the_config_and_the_script_are_named_and_a_config_beside_the_file_comes_first(tmp_path):
    path = sparse(tmp_path / "model.safetensors", published("sd-v2-v"))
    report = report_on(path)
    assert (report.family, report.config, report.script, report.note) == (
        "Stable Diffusion 2", "configs/stable-diffusion/v2-inference-v.yaml", "scripts/txt2img.py",
        "v2-inference.yaml for the base models")
    (tmp_path / "config.yaml").touch()
    assert report_on(path).config == str(tmp_path / "config.yaml")


def test_every_form_says_its_name_size_and_types(tmp_path):
    model = write_model(tmp_path / "model")
    state = torch.load(model)["state_dict"]
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(model, tmp_path / "model.safetensors", dtype=torch.float16)
    convert(model, tmp_path / "folder", config=tmp_path / "model" / "config.yaml")
    forms = {model: "PyTorch", tmp_path / "old.pt": "PyTorch (before 1.6)",
             tmp_path / "model.safetensors": "safetensors", tmp_path / "folder": "folder in the layout of diffusers"}
    for path, form in forms.items():
        report = report_on(path)
        assert (report.form, report.weights, report.odd) == (form, len(state), [])
        assert report.parameters == report_on(model).parameters
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        assert report.bytes == sum(file.stat().st_size for file in files)
    assert report_on(tmp_path / "model.safetensors").dtypes == {"float16": 596, "float32": 12, "int64": 1}
    assert report_on(tmp_path / "folder").config == str(tmp_path / "folder")


def test_a_part_alone_and_an_adapter_are_no_damaged_models(tmp_path):
    stage = {key.removeprefix("first_stage_model."): shape for key, shape in published("sd-v1").items()
             if key.startswith("first_stage_model.")}
    report = report_on(sparse(tmp_path / "vae.safetensors", stage))
    assert (report.parameters, report.odd) == ({"autoencoder": 83_653_863}, [])
    adapter = {"lora_unet_down_blocks_0_proj_in.lora_down.weight": torch.zeros(4, 320)}
    safetensors.torch.save_file(adapter, tmp_path / "lora.safetensors")
    report = report_on(tmp_path / "lora.safetensors")
    assert (report.family, report.odd) == ("LoRA", [])


# ---------------------------------------------------------------------------------------------------------- what is odd

def test_missing_parts_are_named(tmp_path):
    shapes = {key: shape for key, shape in published("sd-v1").items() if key.startswith("model.")}
    assert report_on(sparse(tmp_path / "model.safetensors", shapes)).odd == [
        "the autoencoder is missing (first_stage_model.*)", "the text encoder is missing (cond_stage_model.*)"]


def test_weights_named_as_in_another_layout_are_counted(tmp_path):
    shapes = published("sd-v1") | {"unet.down_blocks.0.resnets.0.conv1.weight": (3, 3), "lora_te_x.alpha": ()}
    found = report_on(sparse(tmp_path / "model.safetensors", shapes)).odd
    assert "1 of 1,145 weights are named as in diffusers: unet.down_blocks.0.resnets.0.conv1.weight" in found
    assert "1 of 1,145 weights are named as in LoRA: lora_te_x.alpha" in found


def test_blocks_that_are_missing_in_between_are_named(tmp_path):
    gone = ("model.diffusion_model.input_blocks.4.", "cond_stage_model.transformer.text_model.encoder.layers.2.",
            "cond_stage_model.transformer.text_model.encoder.layers.3.")
    shapes = {key: shape for key, shape in published("sd-v1").items()
              if not key.startswith(gone) and "position_ids" not in key}
    assert report_on(sparse(tmp_path / "model.safetensors", shapes)).odd == [
        "the blocks cond_stage_model.transformer.text_model.encoder.layers.* lack 2, 3",
        "the blocks model.diffusion_model.input_blocks.* lack 4"]


def test_averages_without_a_weight_and_weights_without_an_average_are_named(tmp_path):
    state = {"model.a.weight": torch.ones(2), "model.b.weight": torch.ones(2), "model_ema.aweight": torch.ones(2),
             "model_ema.cweight": torch.ones(2), "model_ema.num_updates": torch.tensor(3)}
    assert odd(state, tmp_path) == ["1 averaged weights belong to none of the model: model_ema.cweight",
                                    "1 weights of the UNet have no average: model.b.weight"]


def test_position_ids_that_are_no_ids_are_told(tmp_path):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert odd({name: torch.arange(77)[None]}, tmp_path) == []
    assert odd({name: torch.arange(77.0)[None]}, tmp_path) == [f"{name} is float32 instead of int64"]
    drifted = torch.arange(77)[None]
    drifted[0, 41] = 40
    assert odd({name: drifted}, tmp_path) == [
        f"{name} does not count from 0 to 76, as merging in half precision makes it"]


def test_weights_that_are_there_under_two_names_are_counted(tmp_path):
    stem = "cond_stage_model.transformer."
    state = {f"{stem}embeddings.position_ids": torch.arange(77)[None],
             f"{stem}text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert odd(state, tmp_path) == [
        f"1 weights are there twice, with and without `text_model.`: {stem}embeddings.position_ids"]


def test_whole_numbers_among_the_weights_are_told(tmp_path):
    assert odd({"model.a.weight": torch.ones(2, dtype=torch.uint8)}, tmp_path) == [
        "1 weights are whole numbers: model.a.weight"]


def test_what_training_left_is_told_by_name_and_size(tmp_path):
    moments = {"state": {0: {"exp_avg": torch.zeros(5_000_000)}}}
    optimizer = OrderedDict(rate=torch.optim.SGD([torch.zeros(1)], 0.1))
    torch.save({"state_dict": {"model.a.weight": torch.ones(2)}, "global_step": 470000, "note": "x" * 100,
                "optimizer_states": [moments], "loops": {}, "callbacks": optimizer}, tmp_path / "model.ckpt")
    report = report_on(tmp_path / "model.ckpt")
    assert report.beside["global_step"] == "470000"
    assert report.beside["note"] == "'" + "x" * 39 + "..."
    assert report.beside["optimizer_states"] == "20,000,000 bytes of tensors"
    assert report.beside["loops"] == "a dict"
    assert report.beside["callbacks"].startswith("torch.optim.sgd.SGD")
    assert len(report.odd) == 1
    assert "are left over from training: scripts/convert.py writes it without them" in report.odd[0]


def test_a_weight_that_drags_a_large_storage_along_is_told(tmp_path):
    found = odd({"model.a.weight": torch.zeros(9_000_000)[:2]}, tmp_path)
    assert len(found) == 1
    assert "are used by nothing" in found[0]


# ---------------------------------------------------------------------------------------------------------- the numbers

def test_numbers_that_are_not_finite_and_weights_of_zeros_are_found(tmp_path):
    state = {"model.a.weight": torch.tensor([1.0, torch.nan]), "model.b.weight": torch.zeros(4),
             "model.c.weight": torch.tensor([torch.inf]).half(), "model.b.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "model.ckpt")
    assert list(spoiled(open_checkpoint(tmp_path / "model.ckpt"))) == [
        "2 weights have numbers that are not finite: model.a.weight, model.c.weight",
        "1 weights are nothing but zeros: model.b.weight"]
    assert list(spoiled(open_checkpoint(write_model(tmp_path / "model")))) == []


def test_a_byte_that_has_changed_since_the_file_was_written_is_found(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({f"model.{name}.weight": torch.full((1000,), index + 1.0) for index, name in enumerate("abc")}, path)
    assert list(altered(path)) == []
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 2.0).numpy().tobytes()) + 401] ^= 1
    path.write_bytes(content)
    assert list(spoiled(open_checkpoint(path))) == []
    assert list(altered(path)) == [
        "1 of 3 records have changed since they were written (model/data/1): download it again"]
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model.a.weight": torch.ones(9), "model.b.weight": torch.ones(8)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(altered(path)) == []
    safetensors.torch.save_file({"model.a.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert list(altered(tmp_path / "a.safetensors")) == []
    assert list(altered(tmp_path)) == []


# ------------------------------------------------------------------------------------------------------------- the text

def test_the_text_has_one_line_for_each_thing_to_say_whatever_a_file_calls_its_weights(tmp_path):
    safetensors.torch.save_file({"model.\x1b[31m\nred": torch.ones(2, dtype=torch.int8)}, tmp_path / "a.safetensors")
    report = report_on(tmp_path / "a.safetensors")
    report.sha256 = "0123456789abcdef" * 4
    text = list(lines(report))
    assert text[0] == str(tmp_path / "a.safetensors")
    assert any("0123456789)" in line for line in text)
    assert any("no config here is for it" in line for line in text)
    assert all(line.isprintable() for line in text)
