"""One loader: a config and a checkpoint become a model that is ready to run, or one clear error."""

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from support import GOLDENS, golden, tiny_model

from ldm.errors import CheckpointError, ConfigError, ModelError
from ldm.models.load import build_model, load_model

ROOT = Path(__file__).parents[2]
TINY = GOLDENS / "tiny.yaml"
FORMS = ["zip", "legacy", "safetensors"]
SCHEDULE = ("betas", "alphas_cumprod", "posterior_variance", "sqrt_recipm1_alphas_cumprod")


def weights(name: str = "tiny") -> dict[str, torch.Tensor]:
    return dict(tiny_model(name).state_dict())


def write(path, state, form: str = "zip", **beside):
    if form == "safetensors":
        safetensors.torch.save_file({key: weight.contiguous() for key, weight in state.items()}, path)
    else:
        content = {"state_dict": state, **beside} if beside else state
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def tiny_config(name: str = "tiny", **params):
    config = OmegaConf.load(GOLDENS / f"{name}.yaml")
    config.model.params.update(params)
    return config


def assert_holds(model, want):
    got = model.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


# ------------------------------------------------------------------------------------------------------- what it gives

@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_model(form, tmp_path):
    model = load_model(TINY, write(tmp_path / "model.ckpt", weights(), form))
    assert_holds(model, weights())


def test_the_model_is_frozen_in_eval_mode_and_computes_what_its_weights_did(tmp_path):
    model = load_model(TINY, write(tmp_path / "model.ckpt", weights(), "zip", epoch=1))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = golden("inputs")
    t = torch.tensor([500, 500])
    with torch.no_grad():  # attention that may be asked for gradients is computed in another order
        want = tiny_model().apply_model(inputs["x_T"], t, inputs["c"])
    assert torch.equal(model.apply_model(inputs["x_T"], t, inputs["c"]), want)


def test_the_model_stays_as_it_is_when_the_file_is_overwritten(tmp_path):
    path = write(tmp_path / "model.safetensors", weights(), "safetensors")
    model = load_model(TINY, path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_holds(model, weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_take_the_dtype_that_is_asked_for_and_the_schedule_stays_float32(dtype, tmp_path):
    model = load_model(TINY, write(tmp_path / "model.ckpt", weights()), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.state_dict()["model.diffusion_model.out.2.weight"],
                       weights()["model.diffusion_model.out.2.weight"].to(dtype))
    for name in SCHEDULE:
        assert torch.equal(model.state_dict()[name], weights()[name])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_file_that_was_halved_with_its_schedule_gives_the_exact_schedule(stored, tmp_path):
    halved = {key: weight.to(stored) for key, weight in weights().items()}
    exact = {name: weights()[name] for name in tiny_model().float32_buffers if name in halved}
    assert len(exact) == 12
    model = load_model(TINY, write(tmp_path / "model.ckpt", halved))
    assert_holds(model, {key: weight.float() for key, weight in halved.items()} | exact)


def test_a_schedule_that_the_file_holds_in_full_is_the_files(tmp_path):
    state = weights() | {"alphas_cumprod": torch.linspace(0.9, 0.1, 1000)}
    assert torch.equal(load_model(TINY, write(tmp_path / "model.ckpt", state)).alphas_cumprod, state["alphas_cumprod"])


def test_what_the_model_computes_by_itself_may_be_missing_and_what_training_left_may_be_there(tmp_path):
    state = {key: weight for key, weight in weights().items() if "." in key}
    extras = ("lvlb_weights", "logvar", "model_ema.decay", "first_stage_model.loss.discriminator.main.0.weight",
              "cond_stage_model.transformer.text_model.embeddings.position_ids", "embedding_manager.initial")
    model = load_model(TINY, write(tmp_path / "model.ckpt", state | dict.fromkeys(extras, torch.ones(3))))
    assert_holds(model, weights())


def test_channels_and_rows_that_were_saved_turned_are_put_straight(tmp_path):
    turned = {key: weight.mT.contiguous().mT if weight.ndim == 2 else weight for key, weight in weights().items()}
    model = load_model(TINY, write(tmp_path / "model.ckpt", turned))
    assert_holds(model, weights())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_for_a_gpu_is_put_there_with_all_that_it_computed(tmp_path):
    model = load_model(TINY, write(tmp_path / "model.ckpt", weights()), device="cuda", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert torch.equal(model.betas.cpu(), weights()["betas"])


# ---------------------------------------------------------------------------------------------------------------- EMA

def averaged() -> dict[str, torch.Tensor]:
    return {"model_ema." + key.removeprefix("model.").replace(".", ""): weight + 1
            for key, weight in weights().items() if key.startswith("model.")}


@pytest.mark.parametrize(("params", "use_ema", "expected"), [
    ({"use_ema": True}, None, True),
    ({"use_ema": False}, None, False),
    ({}, None, True),
    ({}, False, False),
    ({"use_ema": False}, True, True),
])
def test_averaged_weights_run_if_asked_for_or_if_the_config_keeps_them(params, use_ema, expected, tmp_path):
    config = tiny_config()
    del config.model.params.use_ema
    config.model.params.update(params)
    path = write(tmp_path / "model.ckpt", weights() | averaged())
    state = load_model(config, path, use_ema=use_ema).state_dict()
    key = "model.diffusion_model.out.2.bias"
    assert torch.equal(state[key], weights()[key] + expected)
    assert not [name for name in state if name.startswith("model_ema")]
    other = "first_stage_model.decoder.conv_in.bias"
    assert torch.equal(state[other], weights()[other])


def test_a_config_that_keeps_averages_takes_a_file_without_and_asking_for_them_is_an_error(tmp_path):
    path = write(tmp_path / "model.ckpt", weights())
    assert_holds(load_model(tiny_config(use_ema=True), path), weights())
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        load_model(TINY, path, use_ema=True)


# --------------------------------------------------------------------------------------------------- stages and buffers

def text_config():
    config = tiny_config()
    config.model.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": str(GOLDENS / "tiny-clip")}}
    return config


@pytest.fixture(scope="module")
def texts():
    """The weights of the tiny model with a text encoder."""
    model = build_model(text_config())
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(weight.shape, generator=generator) if weight.is_meta else weight.clone()
            for key, weight in model.state_dict().items()}


def test_a_text_encoder_without_its_inner_name_and_positions_is_loaded(texts, tmp_path):
    theirs = {key.replace(".text_model.", "."): w for key, w in texts.items() if not key.endswith("position_ids")}
    assert len(theirs) == len(texts) - 1
    assert_holds(load_model(text_config(), write(tmp_path / "model.ckpt", theirs)), texts)


@pytest.mark.parametrize("kind", [torch.int64, torch.float16])
def test_positions_that_drifted_in_a_merge_are_counted_anew(kind, texts, tmp_path):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    drifted = texts | {key: (texts[key] - 1).clamp(0).to(kind)}
    model = load_model(text_config(), write(tmp_path / "model.ckpt", drifted))
    assert torch.equal(model.state_dict()[key], torch.arange(77)[None])


def shared_config():
    return tiny_config("tiny-concat", cond_stage_config="__is_first_stage__")


@pytest.mark.parametrize("dropped", ["nothing", "first_stage_model.", "cond_stage_model."])
def test_a_stage_that_serves_twice_is_in_memory_once_and_found_under_either_name(dropped, tmp_path):
    state = weights("tiny-concat")
    state |= {key.replace("first_stage_model.", "cond_stage_model."): weight for key, weight in state.items()}
    path = write(tmp_path / "model.ckpt", {key: w for key, w in state.items() if not key.startswith(dropped)})
    model = load_model(shared_config(), path)
    assert model.cond_stage_model is model.first_stage_model
    assert_holds(model, state)


def test_a_model_without_conditions_needs_no_encoder(tmp_path):
    config = tiny_config("tiny-concat", cond_stage_config="__is_unconditional__", conditioning_key=None)
    config.model.params.unet_config.params.in_channels = 4
    generator = torch.Generator().manual_seed(4)
    want = {key: torch.randn(weight.shape, generator=generator) if weight.is_meta else weight
            for key, weight in build_model(config).state_dict().items()}
    model = load_model(config, write(tmp_path / "model.ckpt", want))
    assert model.cond_stage_model is None
    assert_holds(model, want)


def test_a_measured_scale_is_the_files_and_must_be_there(tmp_path):
    config = tiny_config(scale_by_std=True, scale_factor=1.0)
    path = write(tmp_path / "model.ckpt", weights() | {"scale_factor": torch.tensor(0.75)})
    model = load_model(config, path, dtype=torch.bfloat16)
    assert model.scale_factor.item() == 0.75
    assert model.scale_factor.dtype == torch.float32
    with pytest.raises(CheckpointError, match="1 weights missing: scale_factor"):
        load_model(config, write(path, weights()))


def test_an_autoencoder_by_itself_is_loaded_without_its_loss_and_first_weights(tmp_path):
    config = OmegaConf.create({"model": tiny_config().model.params.first_stage_config})
    config.model.params.lossconfig = {"target": "ldm.modules.losses.LPIPSWithDiscriminator",
                                      "params": {"disc_start": 50001}}
    config.model.params.update(ckpt_path="models/first_stage_models/nowhere/model.ckpt", ema_decay=0.999)
    stage = "first_stage_model."
    state = {key.removeprefix(stage): w for key, w in weights().items() if key.startswith(stage)}
    extras = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    assert_holds(load_model(config, write(tmp_path / "model.ckpt", state | extras)), state)


# ------------------------------------------------------------------------------------------------------------ misfits

def misfit(config, state, path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(config, write(path, state))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path):
    state = weights()
    del state["model.diffusion_model.out.2.bias"]
    state["first_stage_model.quant_conv.bias"] = torch.zeros(7)
    state["model.diffusion_model.extra"] = torch.zeros(1)
    said = misfit(TINY, state, tmp_path / "model.ckpt")
    assert "1 weights missing: model.diffusion_model.out.2.bias" in said
    assert "1 weights unexpected: model.diffusion_model.extra" in said
    assert "1 weights of another shape: first_stage_model.quant_conv.bias (7,) instead of (8,)" in said


def test_a_long_list_is_cut_after_four_and_counted(tmp_path):
    state = {key: weight for key, weight in weights().items() if not key.startswith("first_stage_model.")}
    count = len(weights()) - len(state)
    said = misfit(TINY, state, tmp_path / "model.ckpt")
    assert f"{count} weights missing: first_stage_model." in said
    assert f" and {count - 4} more" in said
    assert said.count("first_stage_model.") == 4


def test_names_that_would_write_to_the_terminal_are_shown_as_text(tmp_path):
    said = misfit(TINY, weights() | {"\x1b[2J\n": torch.zeros(1), "x" * 5000: torch.zeros(1)}, tmp_path / "model.ckpt")
    assert "'\\x1b[2J\\n'" in said
    assert len(said) < 1000


def family(inputs: int, context: int) -> dict[str, torch.Tensor]:
    """The two weights that tell a Stable Diffusion model."""
    blocks = "model.diffusion_model.input_blocks."
    return {f"{blocks}0.0.weight": torch.zeros(320, inputs, 3, 3),
            f"{blocks}1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, context)}


@pytest.mark.parametrize(("state", "said"), [
    (family(4, 1024), "a Stable Diffusion 2 checkpoint: use configs/stable-diffusion/v2-inference-v.yaml"),
    (family(9, 768), "a Stable Diffusion 1.5 inpainting checkpoint: use configs/stable-diffusion/v1-inpainting-infer"),
    (family(8, 768), "an InstructPix2Pix checkpoint: use configs/stable-diffusion/instruct-pix2pix.yaml with "),
    ({"lora_unet_mid.alpha": torch.zeros(1)}, "a LoRA checkpoint: add it to a model with --lora FILE"),
    ({"control_model.out": torch.zeros(1)}, "a ControlNet checkpoint: there is no config for it here"),
])
def test_a_checkpoint_of_another_family_says_which_and_what_it_is_for(state, said, tmp_path):
    assert said in misfit(ROOT / "configs/stable-diffusion/v1-inference.yaml", state, tmp_path / "model.ckpt")


def test_a_config_without_a_model_and_a_missing_config_are_config_errors(tmp_path):
    path = write(tmp_path / "model.ckpt", weights())
    with pytest.raises(ConfigError, match="no model section"):
        load_model(OmegaConf.create({"data": {}}), path)
    with pytest.raises(ConfigError, match=r"no config at .*nowhere\.yaml"):
        load_model(tmp_path / "nowhere.yaml", path)


def test_a_part_that_would_be_left_without_a_value_is_an_error(tmp_path, monkeypatch):
    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(2))
            self.register_buffer("steps", torch.arange(3), persistent=False)

    module = types.ModuleType("forgetful")
    module.Forgetful = Forgetful
    monkeypatch.setitem(sys.modules, "forgetful", module)
    path = write(tmp_path / "model.ckpt", {"weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match="Forgetful computes steps on the meta device"):
        load_model(OmegaConf.create({"model": {"target": "forgetful.Forgetful"}}), path)


def test_errors_of_config_and_checkpoint_are_errors_of_the_model():
    assert issubclass(ConfigError, ModelError)
    assert issubclass(CheckpointError, ModelError)


def test_loading_is_quiet_and_leaves_the_random_state_alone(tmp_path, caplog):
    path = write(tmp_path / "model.ckpt", weights())
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        load_model(TINY, path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records


# ------------------------------------------------------------------------------------------------------------- memory

SLACK = 8 << 20  # bytes that the allocator may keep beside the 46 or 92 MiB of these weights
MEASURE = """
import re, sys
from pathlib import Path
import torch
from omegaconf import OmegaConf
from ldm.models.load import load_model

torch.set_num_threads(1)

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

config, path, dtype = OmegaConf.load(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
load_model(OmegaConf.load(sys.argv[4]), sys.argv[5], dtype=dtype)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = load_model(config, path, dtype=dtype)
size = sum(weight.nbytes for weight in model.state_dict().values())
print(peak() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures the memory of a process of Linux")
@pytest.mark.parametrize(("form", "dtype"), [("zip", "float32"), *((form, "bfloat16") for form in FORMS)])
def test_loading_takes_the_memory_of_the_weights_and_no_second_copy(form, dtype, tmp_path):
    small = OmegaConf.create({"model": tiny_config().model.params.first_stage_config})
    large = OmegaConf.merge(small, {"model": {"params": {"ddconfig": {"ch": 96}}}})
    files = []
    for name, config in (("large", large), ("small", small)):
        state = {key: torch.ones(weight.shape) for key, weight in build_model(config).state_dict().items()}
        OmegaConf.save(config, tmp_path / f"{name}.yaml")
        files += [tmp_path / f"{name}.yaml", write(tmp_path / f"{name}.ckpt", state, form)]
    command = [sys.executable, "-c", MEASURE, *map(str, files[:2]), dtype, *map(str, files[2:])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    taken, size = map(int, done.stdout.split())
    assert taken < 1.15 * size + SLACK
