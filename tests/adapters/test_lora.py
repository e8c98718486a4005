"""LoRA files: what they add to a model is what diffusers and peft make of them, and can be taken back to the bit."""

import json
import re

import peft
import pytest
import torch
from adapters.both import answer, assert_same, ours, theirs
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from support import GOLDENS, assert_matches
from torch.nn import functional as F

from ldm.adapters.lora import Lora, merge, merge_for_good, read_lora
from ldm.adapters.names import places
from ldm.errors import CheckpointError
from ldm.models.load import build_model
from ldm.modules.encoders import text
from ldm.modules.encoders.clip import ClipConfig
from ldm.util import instantiate_from_config

TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
               "conv_shortcut", "time_emb_proj", "conv"]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def model(folder):
    return ours(folder)


@pytest.fixture
def pipeline(folder):
    return theirs(folder)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def factors(layer: torch.nn.Module, rank: int = 3) -> dict[str, torch.Tensor]:
    """Random up and down of a linear or a convolution layer, by the words of Kohya's trainer."""
    out, *kernel = layer.weight.shape
    ones = [1] * (len(kernel) - 1)
    return {"lora_down.weight": random(rank, *kernel), "lora_up.weight": random(out, rank, *ones)}


def kohya(pipeline, alpha: float | None = 2.0) -> dict[str, torch.Tensor]:
    """A file of Kohya's trainer that changes each layer of the UNet's blocks and of the text encoder."""
    state = {}
    for prefix, network, only in (("lora_unet_", pipeline.unet, r".*_block.*"),
                                  ("lora_te_text_model_", pipeline.text_encoder, r".*")):
        for name, layer in network.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and re.match(only, name):
                parts = factors(layer) | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
                state |= {f"{prefix}{name.replace('.', '_')}.{part}": weight for part, weight in parts.items()}
    return state


def saved(path, state: dict[str, torch.Tensor], **metadata: str):
    if path.suffix == ".safetensors":
        save_file(state, path, metadata)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("alpha", [2.0, None])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_file_of_kohyas_trainer_does_what_diffusers_makes_of_it(model, pipeline, tmp_path, suffix, alpha):
    state, before = kohya(pipeline, alpha), answer(model)
    path = saved(tmp_path / f"style{suffix}", state)
    merge(model, [read_lora(path)])
    assert (answer(model) - before).abs().max() > 0.1
    pipeline.load_lora_weights(state)
    assert_same(model, pipeline)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("settings", [
    {"lora_alpha": 6}, {"lora_alpha": 6, "use_rslora": True},
    {"lora_alpha": 6, "alpha_pattern": {"attn1.to_k": 1, Q: 2, "1.self_attn.k_proj": 3}},
], ids=["alpha", "rslora", "pattern"])  # fmt: skip
def test_a_file_of_diffusers_does_what_peft_did(model, pipeline, tmp_path, settings):
    networks = {"unet": (pipeline.unet, UNET_LAYERS), "text_encoder": (pipeline.text_encoder, TEXT_LAYERS)}
    layers, told = {}, {}
    for name, (network, targets) in networks.items():
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
        network.add_adapter(config, adapter_name="default")
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
        told[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    pipeline.save_lora_weights(tmp_path, **layers, **told)
    merge(model, [read_lora(tmp_path / "pytorch_lora_weights.safetensors")])
    assert_same(model, pipeline)


def test_a_folder_of_peft_keeps_its_scale_beside_the_file(model, pipeline, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=UNET_LAYERS, init_lora_weights=False)
    peft.get_peft_model(pipeline.unet, config).save_pretrained(tmp_path)
    merge(model, [read_lora(tmp_path / "adapter_model.safetensors")])
    assert_same(model, pipeline)


def test_the_first_files_of_diffusers_are_read(model, pipeline, tmp_path):
    wide, text = random(4, 32), random(4, 64)
    state = {}
    for old in ("to_q", "to_k", "to_v", "to_out"):
        unet = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.{old}_lora"
        encoder = f"text_encoder.text_model.encoder.layers.1.self_attn.{old}_lora"
        for name, down in ((unet, wide), (encoder, text)):
            state |= {f"{name}.down.weight": down.clone(), f"{name}.up.weight": random(down.shape[1], 4)}
    merge(model, [read_lora(saved(tmp_path / "old.bin", state))])
    pipeline.load_lora_weights(state)
    assert_same(model, pipeline)


def test_every_spelling_of_a_layer_means_the_same_weight(model):
    known = places(model)
    ours = "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
    theirs = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    weight = model.get_submodule(f"model.diffusion_model.{ours}").weight
    for name in (f"lora_unet_{ours}", f"lora_unet_{theirs}", f"unet.{theirs}", theirs, ours, f"diffusion_model.{ours}",
                 f"model.diffusion_model.{ours}", f"base_model.model.{theirs}", f"unet.{theirs.removesuffix('.0')}"):
        assert known[name.replace(".", "_")].weight is weight, name


def test_the_names_of_the_full_size_model_are_those_of_diffusers():
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    known = places(build_model("configs/stable-diffusion/v1-inference.yaml"))
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "in_features")
              or isinstance(layer, torch.nn.Conv2d)}
    found = {name: known[f"unet_{name.replace('.', '_')}"] for name in layers}
    assert {name: place.weight.shape for name, place in found.items()} == {
        name: layer.weight.shape for name, layer in layers.items()}
    assert len({place.key for place in found.values()}) == len(layers) == 282


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_adapters_add_up_with_their_weights(model, pipeline, tmp_path):
    first = kohya(pipeline)
    second = {key: random(*weight.shape, seed=9) if weight.ndim else weight for key, weight in first.items()}
    loras = [read_lora(saved(tmp_path / "a.safetensors", first), 0.7),
             read_lora(saved(tmp_path / "b.safetensors", second), -0.4)]
    merge(model, loras)
    pipeline.load_lora_weights(first, adapter_name="a")
    pipeline.load_lora_weights(second, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.7, -0.4])
    assert_same(model, pipeline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undoing_gives_back_every_bit(folder, pipeline, tmp_path, dtype):
    model = ours(folder, dtype)
    lora = read_lora(saved(tmp_path / "style.safetensors", kohya(pipeline)))
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    one = merge(model, [lora])
    two = merge(model, [Lora(lora.path, lora.layers, -0.5), lora])
    changed = [key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])]
    assert len(changed) == len(lora.layers)
    two.undo()
    one.undo()
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_undoing_finds_weights_that_have_moved_since(model, pipeline, tmp_path):
    lora = read_lora(saved(tmp_path / "style.safetensors", kohya(pipeline)))
    before = answer(model)
    merged = merge(model, [lora])
    model.to(memory_format=torch.channels_last)
    model.double().float()
    merged.undo()
    model.to(memory_format=torch.contiguous_format)
    assert torch.equal(answer(model), before)


def test_half_precision_is_summed_in_full_and_cast_once(folder, tmp_path):
    model = ours(folder, torch.bfloat16)
    weight = places(model)[f"unet_{Q.replace('.', '_')}"].weight
    up, down, plain = random(32, 4), random(4, 32), weight.float()
    path = saved(tmp_path / "q.safetensors", {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up})
    small = [read_lora(path, 1e-3) for _ in range(50)]
    merge_for_good(model, small)
    torch.testing.assert_close(weight, (plain + 0.05 * up @ down).bfloat16(), rtol=0, atol=0)


def test_a_convolution_with_a_core_is_three_in_a_row(model, tmp_path):
    name = "input_blocks.1.0.out_layers.3"
    layer = model.get_submodule(f"model.diffusion_model.{name}")
    down, mid, up = random(3, 32, 1, 1), random(2, 3, 3, 3), random(32, 2, 1, 1)
    x = random(1, 32, 8, 8)
    want = layer(x) + 1.5 / 3 * F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    key = f"lora_unet_{name.replace('.', '_')}"
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up,
             f"{key}.alpha": torch.tensor(1.5)}
    merge(model, [read_lora(saved(tmp_path / "locon.safetensors", state))])
    assert_matches(layer(x), want)


def test_openclips_fused_projections_take_a_change_each(monkeypatch, tmp_path):
    monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (ClipConfig(width=32, layers=2, heads=4, act="gelu"), 32))
    config = OmegaConf.load(GOLDENS / "tiny.yaml").model
    config.params.cond_stage_config = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"arch": "tiny"}}
    model = instantiate_from_config(config)
    block = model.cond_stage_model.model.transformer.resblocks[1]
    targets = {"self_attn_q_proj": block.attn.in_proj_weight[:32], "self_attn_k_proj": block.attn.in_proj_weight[32:64],
               "self_attn_v_proj": block.attn.in_proj_weight[64:], "self_attn_out_proj": block.attn.out_proj.weight,
               "mlp_fc1": block.mlp.c_fc.weight, "mlp_fc2": block.mlp.c_proj.weight}
    state, want = {}, {}
    for seed, (name, weight) in enumerate(targets.items()):
        down, up = random(2, weight.shape[1], seed=seed), random(weight.shape[0], 2, seed=seed)
        key = f"lora_te_text_model_encoder_layers_1_{name}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        want[name] = weight.detach() + up @ down
    before = block.attn.in_proj_weight.detach().clone()
    merged = merge(model, [read_lora(saved(tmp_path / "te.safetensors", state))])
    for name, weight in targets.items():
        torch.testing.assert_close(weight.detach(), want[name])
    merged.undo()
    assert torch.equal(block.attn.in_proj_weight, before)


def cross_attention(width: int, prefix: str = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0") -> dict:
    key = f"{prefix}_attn2_to_k"
    return {f"{key}.lora_down.weight": random(4, width), f"{key}.lora_up.weight": random(640, 4)}


XL = "lora_unet_input_blocks_4_1_transformer_blocks_1"
OTHERS = {
    "Stable Diffusion 2": cross_attention(1024),
    "Stable Diffusion XL": cross_attention(2048, XL),
    "FLUX": {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{end}.weight": random(4, 4) for end in ("down", "up")},
    "Stable Diffusion 3": {f"transformer.transformer_blocks.0.attn.to_q.lora_{end}.weight": random(4, 4)
                           for end in "AB"},
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_an_adapter_of_another_family_is_refused_by_its_name(tmp_path, family):
    model = build_model("configs/stable-diffusion/v1-inference.yaml")
    lora = read_lora(saved(tmp_path / "other.safetensors", OTHERS[family]))
    with pytest.raises(CheckpointError, match=f"other.safetensors does not fit the model: it is for {family}, and this "
                                              "is Stable Diffusion 1 "):
        merge(model, [lora])


def test_an_adapter_that_fits_in_part_leaves_the_model_as_it_was(model, pipeline, tmp_path):
    state = kohya(pipeline)
    extra = {f"lora_unet_no_such_layer.{part}": torch.ones(3, 3) for part in ("lora_down.weight", "lora_up.weight")}
    lora = read_lora(saved(tmp_path / "more.safetensors", state | extra))
    before = answer(model)
    with pytest.raises(CheckpointError, match="1 of 178 layers are not in it: lora_unet_no_such_layer"):
        merge(model, [lora])
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("part, kind", [
    ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("oft_blocks", "OFT"), ("diff", "full-weight"),
])  # fmt: skip
def test_adapters_of_another_kind_are_refused_by_name(tmp_path, part, kind):
    state = cross_attention(768) | {f"lora_unet_mid_block_attentions_0_proj_in.{part}": torch.ones(4, 4)}
    with pytest.raises(CheckpointError, match=f"is a {kind} adapter, which is not supported"):
        read_lora(saved(tmp_path / "other.safetensors", state))


KEY = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize("state, message", [
    ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "holds no LoRA, but model.diffusion_model.out.2.weight"),
    (cross_attention(768) | {"something": torch.ones(1)}, "1 weights that are no part of a LoRA: something"),
    ({f"{KEY}.lora_up.weight": torch.ones(4, 4)}, r"is not complete: of \w+ it has only up \(4, 4\)"),
    ({f"{KEY}.lora_up.weight": torch.ones(4, 4), f"{KEY}.lora_down.weight": torch.ones(3, 4)}, "is made of down"),
    ({f"{KEY}.lora_up.weight": torch.ones(4), f"{KEY}.lora_down.weight": torch.ones(4)}, "is made of down"),
    ({f"{KEY}.lora_up.weight": torch.ones(4, 2), f"{KEY}.lora_down.weight": torch.full((2, 4), torch.nan)},
     "numbers that are not finite"),
])  # fmt: skip
def test_a_file_that_is_no_whole_lora_says_what_it_is(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        read_lora(saved(tmp_path / "file.safetensors", state))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no LoRA file .*nowhere.safetensors"):
        read_lora(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("settings, message", [
    ("{", "settings that cannot be read"), ("[1]", "settings that cannot be read"),
    (json.dumps({"unet.lora_alpha": "much"}), "settings that make no sense"),
    (json.dumps({"unet.alpha_pattern": [1]}), "settings that make no sense"),
    (json.dumps({"unet.alpha_pattern": {"(a+)+$": 1}}), "by the expression .* not supported"),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_not_passed_over(tmp_path, settings, message):
    state = {f"unet.{Q}.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    with pytest.raises(CheckpointError, match=message):
        read_lora(saved(tmp_path / "file.safetensors", state, lora_adapter_metadata=settings))


def test_reading_is_independent_of_the_files_name(pipeline, tmp_path):
    """A file without an ending is told by its content, as weights are everywhere."""
    path = saved(tmp_path / "style.safetensors", kohya(pipeline))
    bare = path.rename(tmp_path / "style")
    assert {layer.name for layer in read_lora(bare).layers} == {key.rpartition(".lora_")[0] for key in load_file(bare)
                                                                if ".lora_" in key}
