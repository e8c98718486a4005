"""From options to a run: what is chosen, and what is told before a weight is read."""

import pytest
import torch
from tiny import write_model

from ldm.checkpoint import Family
from ldm.checkpoint.families import FIRST
from ldm.data.shapes import FORMS
from ldm.errors import CheckpointError, ConfigError, DeviceError, ImageError, MissingExtra, RequestError
from ldm.generation.loading import choose, open_run
from ldm.generation.options import REPOSITORY, ModelOptions, RunOptions, find, find_checkpoint
from ldm.generation.request import Request
from ldm.generation.rows import Row

SD2 = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 9, 3, 3, dtype=torch.float16),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(1, 1024),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_the_config_beside_the_weights_comes_first(model):
    chosen = choose(ModelOptions(ckpt=str(model)))
    assert (chosen.checkpoint, chosen.config) == (model, model.with_name("config.yaml"))
    assert chosen.geometry.side == 64


def test_a_config_that_is_named_wins(model, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(model.with_name("config.yaml").read_text())
    assert choose(ModelOptions(ckpt=str(model), config=str(other))).config == other


def test_weights_that_tell_their_family_choose_the_shipped_config(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    torch.save(SD2, tmp_path / "weights.ckpt")
    with caplog.at_level("INFO"):
        chosen = choose(ModelOptions(ckpt=str(tmp_path / "weights.ckpt")))
    assert chosen.config == REPOSITORY / "configs/stable-diffusion/v2-inpainting-inference.yaml"
    assert "Stable Diffusion 2 inpainting" in caplog.text


def test_weights_that_tell_nothing_ask_for_a_config(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match="name its YAML with --config"):
        choose(ModelOptions(ckpt=str(tmp_path / "weights.ckpt")))


def test_with_no_checkpoint_at_hand_the_usual_place_and_the_option_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.generation.options.REPOSITORY", tmp_path)
    with pytest.raises(CheckpointError, match=r"models/ldm/stable-diffusion-v1/model\.ckpt.*--ckpt FILE"):
        choose(ModelOptions())


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A tiny model where the one that ships with the project lies, seen from another folder."""
    checkout = tmp_path / "checkout"
    weights = write_model(checkout / "models/ldm/shapes", suffix=".safetensors")
    with open(weights.with_name("config.yaml"), "a") as config:
        config.write("prompt_grammar: {target: ldm.data.shapes.parse}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("ldm.generation.options.REPOSITORY", checkout)
    return weights


def test_with_no_checkpoint_at_hand_the_shipped_model_is_taken_and_that_is_said_in_one_line(shipped, caplog):
    with caplog.at_level("INFO"):
        chosen = choose(ModelOptions())
    assert (chosen.checkpoint, chosen.config) == (shipped, shipped.with_name("config.yaml"))
    (said,) = caplog.messages
    assert "models/ldm/stable-diffusion-v1/model.ckpt" in said
    assert "python scripts/fetch_model.py v1.4" in said


def test_the_shipped_model_takes_the_place_of_no_other(shipped, monkeypatch):
    with pytest.raises(CheckpointError, match="fetch_model"):
        choose(ModelOptions(config="configs/stable-diffusion/v1-inference.yaml"))
    assert find_checkpoint(ModelOptions(ckpt="mine.ckpt")).name == "mine.ckpt"
    usual = shipped.parents[1] / "stable-diffusion-v1/model.ckpt"
    write_model(usual.parent)
    assert choose(ModelOptions()).checkpoint == usual


def test_a_prompt_that_the_shipped_model_cannot_read_is_told_in_one_line(shipped, tmp_path, caplog):
    chosen = choose(ModelOptions())
    run = RunOptions(outdir=str(tmp_path / "out"), watermark="", safety="off")

    def warnings(*prompts: str) -> list[str]:
        caplog.clear()
        open_run([Row(Request(prompt=prompt)) for prompt in prompts], ModelOptions(device="cpu"), run, print, chosen)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings("A large red circle on a blue background", "") == []
    (said,) = warnings("a small red ring on a blue background", "an astronaut on a horse", "a horse", "a horse")
    assert "'an astronaut on a horse'" in said
    assert all(form in said for form in FORMS)
    assert "and so for 1 more" in said
    (said,) = warnings("a large crimson circle on a blue background")
    assert "no colour 'crimson'; it knows red, green" in said


def test_shipped_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "configs/stable-diffusion/v1-inference.yaml"
    assert find(name) == REPOSITORY / name
    (tmp_path / "configs/stable-diffusion").mkdir(parents=True)
    (tmp_path / name).touch()
    assert find(name).absolute() == tmp_path / name
    assert not find("nowhere.yaml").exists()


@pytest.mark.parametrize(
    ("options", "request_", "error", "message"),
    [
        ({"device": "gpu"}, {}, DeviceError, "device must be auto"),
        ({}, {"width": 40}, RequestError, "W must be a positive multiple of 16"),
        ({}, {"init_img": "nowhere.png"}, ImageError, "there is no picture at nowhere.png"),
        ({"outdir": "taken"}, {}, RequestError, "a file is in the way"),
        ({"safety": "black"}, {}, CheckpointError, "safety-checker"),
    ],
)
def test_what_can_be_told_without_the_weights_is_told_before_they_are_read(
    model, monkeypatch, tmp_path, options, request_, error, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "taken").touch()
    (tmp_path / "damaged.ckpt").write_bytes(b"no weights at all")
    chosen = choose(ModelOptions(ckpt="damaged.ckpt", config=str(model.with_name("config.yaml"))))
    models = ModelOptions(ckpt="damaged.ckpt", **{key: options[key] for key in options.keys() & {"device"}})
    runs = RunOptions(**{"outdir": "out", **{key: options[key] for key in options.keys() - {"device"}}})
    with pytest.raises(error, match=message):
        open_run([Row(Request(**request_))], models, runs, print, chosen)


def test_a_missing_watermark_package_is_told_before_the_weights_are_read(model, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "imwatermark", None)
    chosen = choose(ModelOptions(ckpt=str(model)))
    with pytest.raises(MissingExtra, match="--watermark off"):
        open_run([Row(Request())], ModelOptions(), RunOptions(outdir=str(tmp_path)), print, chosen)


def test_a_run_knows_its_device_and_precision(model, tmp_path):
    options = ModelOptions(ckpt=str(model), device="cpu", precision="bf16")
    run = open_run([Row(Request())], options, RunOptions(outdir=str(tmp_path), watermark="", safety="off"), print,
                   choose(options))
    assert run.recorder.how | {"device": "cpu", "precision": "bf16", "use_ema": None} == run.recorder.how
    assert next(run.pipeline.model.parameters()).dtype == torch.bfloat16
    assert run.pipeline.model.betas.dtype == torch.float32


def test_a_watermark_that_is_not_named_is_that_of_the_family(model, monkeypatch, tmp_path):
    def text(**given) -> str:
        run = open_run([Row(Request())], options, RunOptions(outdir=str(tmp_path), safety="off", **given), print,
                       choose(options))
        assert run.finish.text == run.recorder.how["watermark"]
        return run.finish.text

    options = ModelOptions(ckpt=str(model), device="cpu", precision="full")
    assert text() == "StableDiffusionV1"
    second = Family("Tiny 2", None, None, {FIRST: (32, 4, 3, 3)}, watermark="SDV2")
    monkeypatch.setattr("ldm.checkpoint.families.FAMILIES", (second,))
    assert [text(), text(watermark="mine"), text(watermark="")] == ["SDV2", "mine", ""]


def test_a_config_that_does_not_exist_is_a_config_error(model):
    with pytest.raises(ConfigError, match="no config at nowhere"):
        choose(ModelOptions(ckpt=str(model), config="nowhere.yaml"))
