"""Weights are written one by one, whole or not at all, and read back as they were, here and by others."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny import write_model

from ldm.checkpoint import open_checkpoint, read_checkpoint, read_object
from ldm.checkpoint.diffusers import REST
from ldm.checkpoint.write import ALIGNMENT, unfinished
from ldm.errors import CheckpointError, ConfigError, OutputError
from ldm.models.convert import convert

ROOT = Path(__file__).parent.parent


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    return {
        "betas": draw(5),
        "model.diffusion_model.out.2.weight": draw(3, 4, 2),
        "model.diffusion_model.out.2.bias": draw(5).half(),
        "first_stage_model.conv.weight": draw(4, 4).bfloat16(),
        "first_stage_model.empty": torch.zeros(0, 3),
        "cond_stage_model.ids": torch.arange(7)[None],
        "cond_stage_model.mask": torch.tensor([True, False]),
        "cond_stage_model.turned": draw(3, 5).T,
        "scale_factor": torch.tensor(0.18215, dtype=torch.float64),
        "model_ema.diffusion_modelout2weight": draw(3, 4, 2),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000),
    }


@pytest.fixture
def source(tmp_path):
    beside = {"global_step": 470000, "version": "2.0", "callbacks": {}}
    torch.save({"state_dict": weights(), **beside}, tmp_path / "src.ckpt")
    return tmp_path / "src.ckpt"


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        assert torch.equal(got[key], want[key]), key


# ------------------------------------------------------------------------------------------------------ there and back

def test_every_type_and_shape_of_weight_goes_to_safetensors_and_back(source, tmp_path):
    convert(source, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "model.ckpt")
    for path in (tmp_path / "model.safetensors", tmp_path / "model.ckpt"):
        assert_same(read_checkpoint(path), weights())
    assert_same(safetensors.torch.load_file(tmp_path / "model.safetensors"), weights())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_ckpt_as_its_own(mmap, source, tmp_path):
    convert(source, tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True, mmap=mmap)
    assert_same(content["state_dict"], weights())
    assert list(content["state_dict"]) == list(weights())
    assert (content["global_step"], content["version"]) == (470000, "2.0")


def test_the_ckpt_is_a_sound_zip_with_each_weight_at_an_even_place(source, tmp_path):
    convert(source, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        assert archive.testzip() is None
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    places = [weight.data_ptr() - checkpoint.file.address for weight in checkpoint.tensors.values() if weight.numel()]
    assert not any(place % ALIGNMENT for place in places)


def test_what_training_notes_beside_the_weights_goes_with_them_and_objects_do_not(source, tmp_path):
    convert(source, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "global_step": "470000", "version": "2.0"}
    convert(tmp_path / "model.safetensors", tmp_path / "model.ckpt")
    content = read_object(tmp_path / "model.ckpt")
    assert {key: value for key, value in content.items() if key != "state_dict"} == {
        "global_step": 470000, "version": "2.0"}


def test_the_metadata_of_safetensors_is_kept_through_every_form(tmp_path):
    folder = tmp_path / "model"
    state = safetensors.torch.load_file(write_model(folder, suffix=".safetensors"))
    notes = {"format": "pt", "modelspec.title": "Ærlig talt", "count": "12"}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata=notes)
    convert(tmp_path / "a.safetensors", tmp_path / "folder", config=folder / "config.yaml")
    convert(tmp_path / "folder", tmp_path / "b.ckpt")
    convert(tmp_path / "b.ckpt", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == notes
    assert_same(read_checkpoint(tmp_path / "b.safetensors"), read_checkpoint(tmp_path / "a.safetensors"))


def test_averaged_weights_and_all_else_without_a_place_survive_a_folder(tmp_path):
    model = write_model(tmp_path / "model")
    state = torch.load(model)["state_dict"]
    state |= {"model_ema." + key.removeprefix("model.").replace(".", ""): weight + 1
              for key, weight in state.items() if key.startswith("model.")}
    state |= {"model_ema.decay": torch.tensor(0.9999), "first_stage_model.loss.logvar": torch.ones(())}
    torch.save({"state_dict": state}, model)
    convert(model, tmp_path / "folder", config=tmp_path / "model" / "config.yaml")
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    assert_same(read_checkpoint(tmp_path / "back.ckpt"), state)


def test_only_a_folder_of_another_program_is_said_to_hold_less(tmp_path, caplog):
    model = write_model(tmp_path / "model")
    convert(model, tmp_path / "folder", config=tmp_path / "model" / "config.yaml")
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    assert not caplog.messages
    (tmp_path / "folder" / REST).unlink()
    convert(tmp_path / "folder", tmp_path / "less.ckpt")
    assert "text_projection" in caplog.text
    assert set(read_checkpoint(model)) - set(read_checkpoint(tmp_path / "less.ckpt")) == {
        key for key in read_checkpoint(model) if "." not in key or "position_ids" in key}


# --------------------------------------------------------------------------------------------------- types and averages

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_weights_take_a_type_and_what_must_be_exact_keeps_its_own(dtype, name, source, tmp_path):
    convert(source, tmp_path / name, dtype=dtype)
    exact = {"betas", "model_ema.decay"}
    want = {key: weight.to(dtype) if weight.is_floating_point() and key not in exact else weight
            for key, weight in weights().items()}
    assert_same(read_checkpoint(tmp_path / name), want)


def test_a_number_that_half_precision_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    torch.save({"model.weight": torch.tensor([1.0, 1e5])}, tmp_path / "src.ckpt")
    with pytest.raises(OutputError, match=r"model\.weight reaches 1e\+05.*take --bf16"):
        convert(tmp_path / "src.ckpt", tmp_path / "model.ckpt", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["src.ckpt"]
    convert(tmp_path / "src.ckpt", tmp_path / "model.ckpt", dtype=torch.bfloat16)


def test_numbers_that_were_never_finite_are_written_as_they_are(tmp_path):
    state = {"model.weight": torch.tensor([1.0, torch.inf, torch.nan])}
    torch.save(state, tmp_path / "src.ckpt")
    convert(tmp_path / "src.ckpt", tmp_path / "model.ckpt", dtype=torch.float16)
    got = read_checkpoint(tmp_path / "model.ckpt")["model.weight"]
    torch.testing.assert_close(got, state["model.weight"].half(), equal_nan=True)


def test_the_averaged_weights_are_written_alone_or_left_out(source, tmp_path):
    plain = {key: weight for key, weight in weights().items() if not key.startswith("model_ema.")}
    convert(source, tmp_path / "pruned.ckpt", ema=False)
    assert_same(read_checkpoint(tmp_path / "pruned.ckpt"), plain)
    convert(source, tmp_path / "ema.ckpt", ema=True)
    averaged = {"model.diffusion_model.out.2.weight": weights()["model_ema.diffusion_modelout2weight"]}
    assert_same(read_checkpoint(tmp_path / "ema.ckpt"), plain | averaged)
    with pytest.raises(CheckpointError, match="has no EMA weights, which --ema asks for"):
        convert(tmp_path / "pruned.ckpt", tmp_path / "none.ckpt", ema=True)


def test_a_type_that_a_form_cannot_hold_is_named(tmp_path):
    safetensors.torch.save_file({"model.weight": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "src.safetensors")
    convert(tmp_path / "src.safetensors", tmp_path / "copy.safetensors")
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn, which a \.ckpt file cannot hold"):
        convert(tmp_path / "src.safetensors", tmp_path / "model.ckpt")
    convert(tmp_path / "src.safetensors", tmp_path / "model.ckpt", dtype=torch.float16)
    assert read_checkpoint(tmp_path / "model.ckpt")["model.weight"].dtype == torch.float16


# ------------------------------------------------------------------------------------------------ whole or not at all

@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "folder"])
def test_what_is_there_stays_unless_it_is_to_be_replaced(name, tmp_path):
    model = write_model(tmp_path / "model")
    config = tmp_path / "model" / "config.yaml"
    target = tmp_path / name
    convert(model, target, config=config)
    before = {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]}
    with pytest.raises(OutputError, match="already there and was left as it is"):
        convert(model, target, config=config, dtype=torch.float16)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    convert(model, target, config=config, dtype=torch.float16, force=True)
    key = "model.diffusion_model.out.2.weight"
    assert read_checkpoint(target)[key].dtype == torch.float16
    assert sorted(os.listdir(tmp_path)) == sorted(["model", name])


def test_a_file_can_take_its_own_place(source):
    convert(source, source, dtype=torch.float16, force=True)
    assert read_checkpoint(source)["model.diffusion_model.out.2.weight"].dtype == torch.float16


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    model = write_model(tmp_path / "model")
    precious = tmp_path / "holidays"
    precious.mkdir()
    (precious / "beach.png").touch()
    with pytest.raises(OutputError, match="is not a model's folder"):
        convert(model, precious, config=tmp_path / "model" / "config.yaml", force=True)
    with pytest.raises(OutputError, match="is not a model's folder"):
        convert(model, tmp_path / "model", config=tmp_path / "model" / "config.yaml", force=True)
    assert (precious / "beach.png").exists()


def test_an_interrupted_writing_leaves_neither_a_file_nor_a_folder(tmp_path):
    for make in (Path.touch, Path.mkdir):
        with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "target", 1) as path:
            make(path)
            raise KeyboardInterrupt
        assert not os.listdir(tmp_path)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    huge = shutil.disk_usage(tmp_path).total + 1
    with pytest.raises(OutputError, match=rf"needs {huge:,} bytes, and .* has [\d,]+ left"), unfinished(
        tmp_path / "target", huge
    ):
        pytest.fail("the block must not be entered")
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_to_is_an_error_of_one_line(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/model\.ckpt"):
        convert(source, tmp_path / "file" / "model.ckpt")


def test_folders_on_the_way_are_made(source, tmp_path):
    convert(source, tmp_path / "a" / "b" / "model.ckpt")
    assert_same(read_checkpoint(tmp_path / "a" / "b" / "model.ckpt"), weights())


# ---------------------------------------------------------------------------------------------------------------- forms

@pytest.mark.parametrize("name", ["model.safetensor", "model.bin", "v1.5"])
def test_an_ending_that_is_no_form_is_an_error_before_anything_is_read(name, tmp_path):
    with pytest.raises(OutputError, match=r"must end in \.ckpt.* or in / for a folder"):
        convert(tmp_path / "absent.ckpt", tmp_path / name)


def test_a_name_with_a_dot_is_a_folder_if_it_ends_in_a_slash(tmp_path):
    model = write_model(tmp_path / "model")
    convert(model, f"{tmp_path}/v1.5/", config=tmp_path / "model" / "config.yaml")
    assert_same(read_checkpoint(tmp_path / "v1.5"), read_checkpoint(model))


def test_a_folder_needs_the_config_and_takes_only_models_that_it_has_a_place_for(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="name it with --config"):
        convert(model, tmp_path / "folder")
    with pytest.raises(ConfigError, match="has no place in"):
        convert(model, tmp_path / "folder", config=ROOT / "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml")
    assert os.listdir(tmp_path) == ["model"]


def test_the_blocks_that_stable_diffusion_2_skips_are_kept_beside_its_folder(tmp_path):
    model = write_model(tmp_path / "model")
    state = torch.load(model)["state_dict"]
    state = {key: weight for key, weight in state.items() if not key.startswith("cond_stage_model.")}
    root = "cond_stage_model.model."
    tower = {"token_embedding.weight": (40, 1024), "positional_embedding": (77, 1024), "ln_final.weight": (1024,),
             "ln_final.bias": (1024,), "text_projection": (1024, 1024), "logit_scale": ()}
    for block in (0, 1, 23):
        tower |= {f"transformer.resblocks.{block}.{name}": shape for name, shape in {
            "attn.in_proj_weight": (3072, 1024), "attn.in_proj_bias": (3072,), "attn.out_proj.weight": (1024, 1024),
            "mlp.c_fc.bias": (128,), "ln_1.weight": (1024,)}.items()}
    state |= {root + name: torch.randn(shape) for name, shape in tower.items()}
    torch.save({"state_dict": state}, model)
    text = (tmp_path / "model" / "config.yaml").read_text()
    stage = "{target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder, params: {layer: penultimate}}\n"
    text = re.sub(r"(?s)cond_stage_config:.*", f"cond_stage_config: {stage}", text)
    (tmp_path / "model" / "config.yaml").write_text(text)
    convert(model, tmp_path / "folder", config=tmp_path / "model" / "config.yaml")
    with safe_open(tmp_path / "folder" / REST, "pt") as file:
        kept = {key.removeprefix(root) for key in file.keys() if key.startswith(root)}  # noqa: SIM118
    assert kept == {name for name in tower if ".resblocks.23." in name} | {"text_projection", "logit_scale"}
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    assert_same(read_checkpoint(tmp_path / "back.ckpt"), state)
    theirs = safetensors.torch.load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    fused = state[root + "transformer.resblocks.1.attn.in_proj_weight"]
    layer = "text_model.encoder.layers.1.self_attn"
    assert torch.equal(torch.cat([theirs[f"{layer}.{letter}_proj.weight"] for letter in "qkv"]), fused)
    assert (tmp_path / "folder" / "tokenizer" / "merges.txt").is_file()


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
import torch
from ldm.models.convert import convert

torch.set_num_threads(1)

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

convert(sys.argv[1], sys.argv[2], dtype=torch.float16)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
convert(sys.argv[3], sys.argv[4], dtype=torch.float16)
print((peak() - before) / Path(sys.argv[3]).stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures the memory of a process of Linux")
@pytest.mark.parametrize("forms", [("ckpt", "safetensors"), ("safetensors", "ckpt")])
def test_converting_takes_the_memory_of_a_few_weights_and_not_of_all(forms, tmp_path):
    paths = []
    for name, count in (("small", 1), ("large", 40)):
        state = {f"model.{index}.weight": torch.ones(512, 1024) for index in range(count)}
        before, after = (tmp_path / f"{name}-{form}.{form}" for form in forms)
        if forms[0] == "ckpt":
            torch.save({"state_dict": state}, before)
        else:
            safetensors.torch.save_file(state, before)
        paths += [before, after]
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.15
