"""Weights files of every form are read; what is no weights file is told in one line."""

import hashlib
import struct
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

from ldm.checkpoint import checkpoint_hash, open_checkpoint, read_checkpoint, read_object
from ldm.checkpoint.unpickle import StandIn
from ldm.errors import CheckpointError

FORMS = ["zip", "legacy", "safetensors"]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    return {
        "model.diffusion_model.out.2.weight": draw(3, 4, 2),
        "model.diffusion_model.out.2.bias": draw(5).half(),
        "first_stage_model.conv.weight": draw(4, 4).bfloat16(),
        "first_stage_model.empty": torch.zeros(0, 3),
        "cond_stage_model.ids": torch.arange(7)[None],
        "scale_factor": torch.tensor(0.18215),
    }


def write(path, state, form: str, **beside):
    """Save a state dict in one of the forms; with `beside`, wrapped as Lightning does it."""
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        content = {"state_dict": state, **beside} if beside else state
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        assert torch.equal(got[key], want[key]), key


# ----------------------------------------------------------------------------------------------------------- the forms

@pytest.mark.parametrize("form", FORMS)
def test_a_bare_state_dict_is_read_as_it_was_written(form, tmp_path):
    assert_same(read_checkpoint(write(tmp_path / "model.ckpt", weights(), form)), weights())


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_state_dict_is_found_in_what_lightning_wraps_around_it(form, tmp_path):
    path = write(tmp_path / "model.ckpt", weights(), form, epoch=3, global_step=470000, callbacks={})
    assert_same(read_checkpoint(path), weights())
    assert read_object(path)["global_step"] == 470000


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_writes_is_read(protocol, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights(), "set": {1, 2}, "pair": (1.5, None, True)}, path, pickle_protocol=protocol)
    assert_same(read_checkpoint(path), weights())
    assert read_object(path)["set"] == {1, 2}
    assert read_object(path)["pair"] == (1.5, None, True)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_views_parameters_and_an_ordered_dict_with_metadata_are_read(form, tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(base=base, row=base[1], turned=base.t(), parameter=torch.nn.Parameter(base[2:, 1:3]))
    state._metadata = {"": {"version": 1}}
    got = read_checkpoint(write(tmp_path / "model.ckpt", state, form))
    assert_same(got, {key: value.detach() for key, value in state.items()})
    assert got["row"].data_ptr() == got["base"].data_ptr() + 6 * 4


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_told_by_the_content_and_not_by_the_name(form, tmp_path):
    for name in ("model.ckpt", "model.safetensors", "model.bin", "model"):
        assert_same(read_checkpoint(write(tmp_path / name, weights(), form)), weights())


@pytest.mark.parametrize("form", FORMS)
def test_reading_leaves_the_numbers_in_the_file_and_writing_to_them_leaves_the_file_alone(form, tmp_path):
    path = write(tmp_path / "model.ckpt", {"weight": torch.ones(1000)}, form)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    weight = checkpoint.tensors["weight"]
    assert checkpoint.file.address <= weight.data_ptr() < checkpoint.file.address + checkpoint.file.size
    weight.fill_(7)
    assert path.read_bytes() == before
    checkpoint.release(weight)
    assert torch.equal(weight, torch.ones(1000))


def test_weights_outlive_the_checkpoint_that_they_were_read_from(tmp_path):
    got = read_checkpoint(write(tmp_path / "model.ckpt", {"weight": torch.arange(5000)}, "zip"))
    assert got["weight"].sum() == sum(range(5000))


# ---------------------------------------------------------------------------------------------- names and other content

def test_a_text_encoder_without_its_inner_name_gets_the_names_of_ours(tmp_path):
    theirs = {
        "cond_stage_model.transformer.embeddings.token_embedding.weight": torch.zeros(1),
        "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias": torch.zeros(2),
        "cond_stage_model.transformer.final_layer_norm.weight": torch.zeros(3),
        "cond_stage_model.transformer.attn_layers.layers.0.0.weight": torch.zeros(4),
    }
    got = read_checkpoint(write(tmp_path / "model.ckpt", theirs, "zip"))
    assert [key.split("transformer.")[1].split(".")[0] for key in got] == ["text_model"] * 3 + ["attn_layers"]


def test_the_averaged_weights_take_the_place_of_the_plain_ones(tmp_path):
    state = {
        "model.diffusion_model.out.2.weight": torch.zeros(2),
        "first_stage_model.conv.weight": torch.zeros(3),
        "model_ema.diffusion_modelout2weight": torch.ones(2),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
    }
    path = write(tmp_path / "model.ckpt", state, "zip")
    assert open_checkpoint(path).has_ema
    assert_same(read_checkpoint(path), state)
    averaged = {"model.diffusion_model.out.2.weight": torch.ones(2), "first_stage_model.conv.weight": torch.zeros(3)}
    assert_same(read_checkpoint(path, use_ema=True), averaged)


def test_asking_for_averaged_weights_of_a_file_without_any_is_an_error(tmp_path):
    state = {"model.weight": torch.zeros(2), "model_ema.decay": torch.tensor(0.9999)}
    with pytest.raises(CheckpointError, match="no EMA weights"):
        read_checkpoint(write(tmp_path / "model.ckpt", state, "zip"), use_ema=True)


@pytest.fixture
def lightning(monkeypatch):
    """Classes that pretend to be of old training code, at names where importing them again would fail."""
    def foreign(module: str, name: str, base: type = object) -> type:
        kind = type(name, (base,), {"__module__": module})
        for missing in {module, module.split(".")[0]} - sys.modules.keys():
            monkeypatch.setitem(sys.modules, missing, types.ModuleType(missing))
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
        return kind
    return foreign


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_left_beside_the_weights_is_read_as_inert_stand_ins(
    form, protocol, tmp_path, lightning, monkeypatch
):
    callback = lightning("pytorch_lightning.callbacks.forgotten", "ModelCheckpoint")
    config = lightning("omegaconf.forgotten", "ListConfig")()
    config.content = [1, 2]
    attributes = lightning("pytorch_lightning.utilities.forgotten", "AttributeDict", dict)(rate=1e-4)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights(), "callbacks": {callback: {"best": torch.tensor(0.5)}}, "config": config,
                "hyper_parameters": attributes, "device": torch.device("cpu"), "dtype": torch.float16},
               path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    for module in [name for name in sys.modules if name.endswith(".forgotten")]:
        monkeypatch.delitem(sys.modules, module)
    got = read_object(path)
    assert_same(got["state_dict"], weights())
    assert isinstance(got["config"], StandIn)
    assert got["config"].name == "omegaconf.forgotten.ListConfig"
    assert got["config"].state == {"content": [1, 2]}
    assert got["hyper_parameters"].items == ["rate", 1e-4]
    assert [key.name for key in got["callbacks"]] == ["pytorch_lightning.callbacks.forgotten.ModelCheckpoint"]
    assert not [name for name in sys.modules if name.endswith(".forgotten")]


def test_the_hash_is_the_sha256_of_the_file(tmp_path):
    path = write(tmp_path / "model.ckpt", weights(), "zip")
    assert checkpoint_hash(path) == open_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, {"other": torch.zeros(3)}, "zip")
    assert checkpoint_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ bad files

def refusal(path) -> str:
    """What is said of a file that cannot be used, which is one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_missing_file_is_told_where_to_put_one(tmp_path):
    assert "put the weights there" in refusal(tmp_path / "model.ckpt")


def test_a_folder_is_told_from_a_file_and_the_diffusers_form_by_name(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "has no unet, vae, text_encoder" in refusal(tmp_path)


def test_an_empty_file_is_to_be_downloaded_again(tmp_path):
    path = tmp_path / "model.ckpt"
    path.touch()
    assert "is empty: download it again" in refusal(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95, 0.999])
def test_a_file_that_was_cut_short_anywhere_is_to_be_downloaded_again(form, part, tmp_path):
    path = write(tmp_path / "model.ckpt", {f"weight.{i}": torch.randn(100) for i in range(20)}, form)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(part * len(whole))])
    assert "download it again" in refusal(path)


def test_a_safetensors_file_shorter_than_its_header_says_so(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 5000) + b'{"weight": ')
    assert "is cut short: it needs 5,008 bytes and has 19" in refusal(path)
    path.write_bytes(b"\x01")
    assert "is cut short" in refusal(path)


@pytest.mark.parametrize(("content", "said"), [
    (b"<!DOCTYPE html>\n<html><title>Sign in", "is a web page ('<!DOCTYPE html> <html><title>Sign in'), not weights"),
    (b"  <html lang='en'>", "download the file itself"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "is a git-lfs pointer"),
    (b'{"error":"Access to model is restricted"}', "not a checkpoint but text ('{\"error\":\"Access to model"),
    (b"Invalid username or password.", "text ('Invalid username or password.')"),
    (b"\x89PNG\r\n\x1a\n0000", "is a picture"),
    (b"\x1f\x8b\x08\x00\x00\x00", "gzip archive"),
    (bytes(range(160, 230)), "starts with a0 a1 a2"),
    (b"\x00" * 64, "starts with 00 00 00"),
    (b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.", "a pickle that torch.save did not write"),
])
def test_what_is_no_checkpoint_at_all_is_called_by_its_name(content, said, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert said in refusal(path)


def test_an_archive_of_something_else_is_to_be_unpacked(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights inside")
    assert "unpack it first" in refusal(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "tar archive" in refusal(path)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}, None])
def test_a_file_without_weights_says_what_it_holds(content, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    assert "holds no weights" in refusal(path)


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "give a file that has a state dict" in refusal(path)


@pytest.mark.parametrize("position", range(12))
def test_a_damaged_pickle_never_ends_in_another_kind_of_error(position, tmp_path):
    """Bytes all over the description are overwritten; either it can still be read or it is a CheckpointError."""
    path = write(tmp_path / "model.ckpt", weights(), "legacy")
    whole = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(position)
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        at = torch.randint(0, 900, (4,), generator=generator).tolist()
        for place, value in zip(at, torch.randint(0, 256, (4,), generator=generator).tolist()):
            damaged[place] = value
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("header", [
    b"[]", b"{", b"\xff\xfe", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"[" * 5000,
    b'{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 0]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "run": 1}}',
    b'{"a": {"dtype": "F32", "shape": [2000], "data_offsets": [0, 8000]}}',
])
def test_a_safetensors_header_that_cannot_be_true_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "download it again" in refusal(path)


def test_safetensors_of_every_type_agree_with_the_library(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool]
    state = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    assert_same(read_checkpoint(path), safetensors.torch.load_file(path))
