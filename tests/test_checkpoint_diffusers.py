"""Folders in the layout of diffusers: theirs load here, ours load there, and the numbers are the same."""

import json
import logging
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import GOLDENS, assert_matches, manifest
from tiny import write_model

from ldm.checkpoint import checkpoint_hash, open_checkpoint, read_checkpoint
from ldm.checkpoint.diffusers import (
    INDEX,
    REST,
    Joined,
    MappedFolder,
    add_text_leftovers,
    open_clip_names,
    split,
    unet_names,
    vae_names,
)
from ldm.checkpoint.folder_config import from_yaml, to_yaml
from ldm.checkpoint.names import rename
from ldm.config import load_config
from ldm.errors import CheckpointError, ConfigError
from ldm.models.convert import convert
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.load import load_model
from ldm.modules.encoders.clip import ClipConfig
from ldm.modules.encoders.openclip import Clip

ROOT = Path(__file__).parent.parent
PIPELINES = {"text": "StableDiffusionPipeline", "v": "StableDiffusionPipeline",
             "inpaint": "StableDiffusionInpaintPipeline", "edit": "StableDiffusionInstructPix2PixPipeline"}
CONFIGS = {"sd-v1": "v1-inference", "sd-v1-inpainting": "v1-inpainting-inference", "sd-v2-base": "v2-inference",
           "sd-v2-v": "v2-inference-v", "sd-v2-inpainting": "v2-inpainting-inference"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(a tiny checkpoint of a kind, the folder that was made of it)."""

    @cache
    def write(kind: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(kind)
        checkpoint = write_model(root, kind)
        convert(checkpoint, root / "folder", config=root / "config.yaml")
        return checkpoint, root / "folder"

    return write


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that diffusers itself saved of one tiny pipeline, by the way in which it did."""
    root = tmp_path_factory.mktemp("saved")
    convert(write_model(root, "text"), root / "ours", config=root / "config.yaml")
    pipeline = theirs(root / "ours")
    pipeline.save_pretrained(root / "plain")
    pipeline.save_pretrained(root / "sharded", max_shard_size="2MB")
    pipeline.save_pretrained(root / "bin", safe_serialization=False)
    halved(pipeline).save_pretrained(root / "fp16", variant="fp16")
    pipeline.save_pretrained(root / "fp16-sharded", variant="fp16", max_shard_size="1MB")
    return root


def theirs(folder, kind: str = "StableDiffusionPipeline"):
    return getattr(diffusers, kind).from_pretrained(folder)


def halved(pipeline):
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    return pipeline


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        assert torch.equal(got[key], want[key]), key


# --------------------------------------------------------------------------------------------- written here, read there

@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_written_reads_as_the_same_checkpoint(kind, written):
    checkpoint, folder = written(kind)
    assert_same(read_checkpoint(folder), read_checkpoint(checkpoint))


@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_takes_every_weight_of_a_folder_and_misses_none(kind, written):
    checkpoint, folder = written(kind)
    state = read_checkpoint(checkpoint)
    pipeline = theirs(folder, PIPELINES[kind])
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model."),
                         ("text_encoder", "cond_stage_model.")):
        mine = [weight for key, weight in state.items() if key.startswith(prefix) and "position_ids" not in key]
        assert sum(p.numel() for p in getattr(pipeline, part).parameters()) == sum(weight.numel() for weight in mine)
        assert load_file(next((folder / part).glob("*.safetensors"))).keys() == {
            key if part != "text_encoder" else f"text_model.{key}" if not key.startswith("text_model.") else key
            for key in getattr(pipeline, part).state_dict()}


@pytest.mark.parametrize("kind", PIPELINES)
@torch.no_grad()
def test_their_networks_on_our_folder_give_our_numbers(kind, written):
    checkpoint, folder = written(kind)
    model, pipeline = load_model(checkpoint.parent / "config.yaml", checkpoint), theirs(folder, PIPELINES[kind])
    x = torch.randn(2, pipeline.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = ["a red bench", "two cats"]
    mine = model.get_learned_conditioning(prompts)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = pipeline.text_encoder(ids)[0]
    assert_matches(mine, text, 1e-5)
    t = torch.tensor([981, 1])
    assert_matches(model.model.diffusion_model(x, t, context=mine), pipeline.unet(x, t, text).sample, 1e-5)
    picture = x[:, :3]
    assert_matches(model.encode_first_stage(picture).mode(), pipeline.vae.encode(picture).latent_dist.mode(), 1e-5)
    assert_matches(model.decode_first_stage(x[:, :4]),
                   pipeline.vae.decode(x[:, :4] / pipeline.vae.config.scaling_factor).sample, 1e-5)


@pytest.mark.parametrize("kind", ["text", "v"])
def test_their_pipeline_on_our_folder_draws_our_latents(kind, written):
    checkpoint, folder = written(kind)
    model, pipeline = load_model(checkpoint.parent / "config.yaml", checkpoint), theirs(folder, PIPELINES[kind])
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mine, _ = DDIMSampler(model).sample(
        S=5, batch_size=1, shape=(4, 16, 16), conditioning=model.get_learned_conditioning(["a red bench"]),
        unconditional_guidance_scale=5.0, unconditional_conditioning=model.get_learned_conditioning([""]), x_T=noise,
        verbose=False)
    latents = pipeline("a red bench", num_inference_steps=5, guidance_scale=5.0, latents=noise.clone(), height=64,
                       width=64, output_type="latent").images
    assert_matches(mine, latents, 1e-3)


# --------------------------------------------------------------------------------------------- written there, read here

@pytest.mark.parametrize("way", ["plain", "sharded", "bin"])
def test_a_folder_that_diffusers_saved_reads_as_the_weights_it_was_made_of(way, saved):
    want = {key: weight for key, weight in read_checkpoint(saved / "model.ckpt").items()
            if "." in key and "position_ids" not in key}
    assert_same(read_checkpoint(saved / way), want)


@pytest.mark.parametrize("way", ["fp16", "fp16-sharded"])
def test_a_folder_with_only_a_variant_reads_as_that(way, saved, caplog):
    with caplog.at_level(logging.INFO, logger="ldm"):
        got = read_checkpoint(saved / way)
    want = {key: weight.half() for key, weight in read_checkpoint(saved / "plain").items()}
    assert_same(got, want)
    assert "fp16" in caplog.text


def test_the_whole_weights_come_before_a_variant(saved, tmp_path):
    both = tmp_path / "both"
    pipeline = theirs(saved / "plain")
    pipeline.save_pretrained(both)
    halved(pipeline).save_pretrained(both, variant="fp16")
    assert {weight.dtype for weight in read_checkpoint(both).values()} == {torch.float32}


@torch.no_grad()
def test_their_folder_is_its_own_config_and_runs_as_the_checkpoint_does(saved):
    want = load_model(saved / "config.yaml", saved / "model.ckpt")
    got = load_model(saved / "sharded", saved / "sharded")
    assert got.state_dict().keys() == want.state_dict().keys()
    for key, weight in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], weight), key
    prompts = ["a red bench", "two cats"]
    assert torch.equal(got.get_learned_conditioning(prompts), want.get_learned_conditioning(prompts))


def test_opening_a_folder_reads_no_weights_and_shows_their_shapes(saved):
    checkpoint = open_checkpoint(saved / "plain")
    assert isinstance(checkpoint.file, MappedFolder)
    assert all(weight.is_meta for weight in checkpoint.outline.values())
    tensors = checkpoint.tensors
    assert {key: (weight.shape, weight.dtype) for key, weight in checkpoint.outline.items()} == {
        key: (weight.shape, weight.dtype) for key, weight in tensors.items()}
    weight = tensors["model.diffusion_model.out.2.weight"]
    before = weight.clone()
    checkpoint.release(weight)
    assert torch.equal(weight, before)


def test_the_hash_of_a_folder_is_that_of_its_weights_alone(saved, tmp_path):
    pipeline = theirs(saved / "plain")
    pipeline.save_pretrained(tmp_path / "copy")
    whole = open_checkpoint(saved / "plain").sha256
    assert checkpoint_hash(tmp_path / "copy") == checkpoint_hash(saved / "plain") == whole
    (tmp_path / "copy" / "unet" / "notes.txt").write_text("no weights")
    assert checkpoint_hash(tmp_path / "copy") == checkpoint_hash(saved / "plain")
    vae = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: weight + 1 for key, weight in load_file(vae).items()}, vae)
    assert checkpoint_hash(tmp_path / "copy") != checkpoint_hash(saved / "plain")


def test_the_names_of_folders_from_before_2023_are_known(saved, tmp_path):
    theirs(saved / "plain").save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    old = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")]
    state = load_file(file)
    for new, name in old:
        state = {key.replace(new, name): weight for key, weight in state.items()}
    save_file(state, file)
    assert_same(read_checkpoint(tmp_path / "old"), read_checkpoint(saved / "plain"))


# ------------------------------------------------------------------------------------------------- the published sizes

def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in state.items()}


def renamed(name: str, prefix: str, names_of) -> dict[str, tuple[int, ...]]:
    """One part of a published checkpoint as diffusers would have it."""
    own = {key.removeprefix(prefix): torch.empty(shape, device="meta") for key, (shape, _) in manifest(name).items()
           if key.startswith(prefix)}
    pieces = {}
    for key, weight in own.items():
        made = split(prefix + key, weight)
        pieces |= {f"{key}/{index}" if len(made) > 1 else key: piece for index, piece in enumerate(made)}
    return shapes(rename(pieces, names_of(own)))


def configs(name: str) -> dict:
    section = load_config(ROOT / f"configs/stable-diffusion/{CONFIGS[name]}.yaml").model
    text = {"text_model.embeddings.token_embedding.weight": torch.empty(49408, 768, device="meta"),
            "text_model.embeddings.position_embedding.weight": torch.empty(77, 768, device="meta"),
            "text_model.encoder.layers.11.mlp.fc1.bias": torch.empty(3072, device="meta"),
            "text_model.encoder.layers.0.mlp.fc1.bias": torch.empty(3072, device="meta")}
    return from_yaml(section, text)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_and_configs_of_each_published_model_are_those_of_diffusers(name):
    made = configs(name)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(made["unet/config.json"])
        vae = diffusers.AutoencoderKL.from_config(made["vae/config.json"])
    assert renamed(name, "model.diffusion_model.", unet_names) == shapes(unet.state_dict())
    assert renamed(name, "first_stage_model.", vae_names) == shapes(vae.state_dict())


SDXL = {
    "sdxl-base": {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                  "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
                  "projection_class_embeddings_input_dim": 2816,
                  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                  "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    "sdxl-refiner": {"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280,
                     "transformer_layers_per_block": 4, "attention_head_dim": (6, 12, 24, 24),
                     "projection_class_embeddings_input_dim": 2560,
                     "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
                     "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D")},
}  # fmt: skip


@pytest.mark.parametrize("name", SDXL)
def test_the_names_of_stable_diffusion_xl_are_known_in_both_directions(name):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(addition_embed_type="text_time", addition_time_embed_dim=256,
                                              use_linear_projection=True, **SDXL[name])
    prefix = "model.diffusion_model."
    assert renamed(name, prefix, unet_names) == shapes(unet.state_dict())
    back = rename(shapes(unet.state_dict()), [(theirs, ours) for ours, theirs in unet_names(unet.state_dict())])
    want = {key.removeprefix(prefix): shape for key, (shape, _) in manifest(name).items() if key.startswith(prefix)}
    assert back == want


def test_the_text_encoder_of_stable_diffusion_2_has_a_place_for_all_but_what_it_skips():
    prefix = "cond_stage_model."
    got = renamed("sd-v2-v", prefix, lambda keys: open_clip_names(keys, skip=1))
    config = transformers.CLIPTextConfig(vocab_size=49408, hidden_size=1024, intermediate_size=4096,
                                         num_hidden_layers=23, num_attention_heads=16)
    with torch.device("meta"):
        want = shapes(transformers.CLIPTextModel(config).state_dict())
    want = {key if key.startswith("text_model.") else f"text_model.{key}": shape for key, shape in want.items()}
    left = {key: shape for key, shape in got.items() if key not in want}
    assert {key: shape for key, shape in got.items() if key in want} == want
    assert {key.partition("resblocks.")[2].partition(".")[0] or key for key in left} == {
        "23", "text_projection.weight", "model.logit_scale"}


def test_their_configs_of_each_published_model_are_read_as_the_yaml_that_made_them(tmp_path):
    for name in CONFIGS:
        for file, content in configs(name).items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(content))
        got = to_yaml(tmp_path / name)["model"]
        want = load_config(ROOT / f"configs/stable-diffusion/{CONFIGS[name]}.yaml").model
        assert got["target"] == want.target
        for key in ("linear_start", "linear_end", "timesteps", "image_size", "channels", "scale_factor",
                    "conditioning_key"):
            assert got["params"][key] == want.params[key], (name, key)
        assert got["params"]["parameterization"] == want.params.get("parameterization", "eps")
        unet, mine = got["params"]["unet_config"]["params"], want.params.unet_config.params
        assert {key: unet[key] for key in mine if key in unet and key not in ("image_size", "use_checkpoint")} == {
            key: value for key, value in mine.items() if key in unet and key not in ("image_size", "use_checkpoint")}
        stage = got["params"]["first_stage_config"]["params"]
        assert stage["ddconfig"] == want.params.first_stage_config.params.ddconfig
        assert stage["embed_dim"] == want.params.first_stage_config.params.embed_dim


# ------------------------------------------------------------------------------------------ OpenCLIP, fused and cut off

@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A folder whose text encoder is of OpenCLIP's width with 2 of its blocks, and our tower with 3 of the same."""
    root = tmp_path_factory.mktemp("towers")
    convert(write_model(root, "text"), root / "folder", config=root / "config.yaml")
    mine = Clip(ClipConfig(width=1024, layers=3, heads=16, ff=64, act="gelu", vocabulary=32, length=8)).eval()
    ours = {f"cond_stage_model.model.{key}": weight for key, weight in mine.state_dict().items()}
    names = open_clip_names([key.removeprefix("cond_stage_model.") for key in ours], skip=1)
    pieces = {}
    for key, weight in ours.items():
        made = split(key, weight)
        pieces |= {f"{key}/{index}" if len(made) > 1 else key: piece for index, piece in enumerate(made)}
    cut = rename({key.removeprefix("cond_stage_model."): weight for key, weight in pieces.items()}, names)
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=1024, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
        max_position_embeddings=8, hidden_act="gelu", bos_token_id=30, eos_token_id=31)
    model = transformers.CLIPTextModel(config).eval()
    own = model.state_dict()
    model.load_state_dict({key: cut[key if key.startswith("text_model.") else f"text_model.{key}"] for key in own})
    for file in (root / "folder" / "text_encoder").iterdir():
        file.unlink()
    model.save_pretrained(root / "folder" / "text_encoder")
    (root / "folder" / REST).unlink()
    return root / "folder", mine, model


def text_weights(folder) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder)
    return {key.removeprefix("cond_stage_model.model."): weight for key, weight in state.items()
            if key.startswith("cond_stage_model.model.")}


@torch.no_grad()
def test_a_tower_without_its_last_block_gives_what_ours_gives_when_it_skips_it(towers):
    _, mine, model = towers
    ids = torch.tensor([[30, 4, 5, 31, 0, 0, 0, 0]])
    assert_matches(mine.text_states(ids, skip=1), model(ids).last_hidden_state, 1e-5)


@torch.no_grad()
def test_the_three_projections_are_fused_again_and_what_is_missing_is_zero(towers):
    folder, mine, _ = towers
    got, want = text_weights(folder), mine.state_dict()
    for key, weight in want.items():
        if not key.startswith("transformer.resblocks.2.") and key not in ("text_projection", "logit_scale"):
            assert torch.equal(got[key], weight), key
    block = {key.partition("resblocks.23.")[2]: weight for key, weight in got.items() if "resblocks.23." in key}
    assert {key: weight.shape for key, weight in block.items()} == {
        key.partition("resblocks.2.")[2]: weight.shape for key, weight in want.items() if "resblocks.2." in key}
    assert not any(weight.any() for weight in [*block.values(), got["text_projection"], got["logit_scale"]])
    assert got["text_projection"].shape == want["text_projection"].shape


@torch.no_grad()
def test_a_block_of_zeros_hands_on_what_it_is_given(towers):
    folder, mine, _ = towers
    zeros = {key.replace("resblocks.23.", "resblocks.2."): weight for key, weight in text_weights(folder).items()}
    tower = Clip(ClipConfig(width=1024, layers=3, heads=16, ff=64, act="gelu", vocabulary=32, length=8)).eval()
    tower.load_state_dict(zeros)
    ids = torch.tensor([[30, 4, 5, 31, 0, 0, 0, 0]])
    assert torch.equal(tower.text_states(ids), mine.text_states(ids, skip=1))


def test_the_weights_of_a_folder_can_be_asked_for_again_and_again(towers):
    tensors = open_checkpoint(towers[0]).tensors
    assert isinstance(tensors, Joined)
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(tensors[key], tensors[key])
    assert tensors[key].shape == (3072, 1024)


# ------------------------------------------------------------------------------------------------------------ refusals

def broken(saved, tmp_path, way: str = "plain") -> Path:
    """A copy of a folder, to be damaged."""
    for source in (saved / way).rglob("*"):
        target = tmp_path / "broken" / source.relative_to(saved / way)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            target.write_bytes(source.read_bytes())
    return tmp_path / "broken"


def refusal(folder) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_part_that_is_missing_is_named(saved, tmp_path):
    folder = broken(saved, tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae holds no weights" in refusal(folder)
    for file in (folder / "vae").iterdir():
        file.unlink()
    (folder / "vae").rmdir()
    assert "has no vae" in refusal(folder)


def test_a_shard_that_is_missing_or_cut_short_is_named(saved, tmp_path):
    folder = broken(saved, tmp_path, "sharded")
    shard = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    shard.write_bytes(shard.read_bytes()[:5000])
    assert f"{shard} is cut short" in refusal(folder)
    shard.unlink()
    assert shard.name in refusal(folder)


def test_an_index_cannot_lead_out_of_its_folder(saved, tmp_path):
    folder = broken(saved, tmp_path, "sharded")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/x.safetensors"}}))
    assert "outside of its folder" in refusal(folder)
    index.write_text(json.dumps({"weight_map": ["x.safetensors"]}))
    assert "does not say which weights" in refusal(folder)
    shards = sorted(path.name for path in (folder / "unet").glob("*.safetensors"))
    index.write_text(json.dumps({"weight_map": {"nowhere.weight": shards[0]}}))
    assert "promises 1 weights" in refusal(folder)


def test_a_part_of_another_kind_is_named(saved, tmp_path):
    folder = broken(saved, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "unet": ["diffusers", "FluxTransformer2DModel"]}))
    assert "is a FluxTransformer2DModel; what can be read is a UNet2DConditionModel" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_names_that_no_model_has_are_kept_as_they_are_and_cost_no_time(part, saved, tmp_path):
    folder = broken(saved, tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    strange = ["a/b", "c/7", f"down_blocks.{10**30}.resnets.0.conv1.weight", f"up_blocks.{'9' * 5000}.x", "",
               "text_model.encoder.layers.0.self_attn.q_proj.weight/5", "decoder.up_blocks.\u0664.x"]
    save_file(load_file(file) | {name: torch.ones(2) for name in strange}, file)
    extra = read_checkpoint(folder).keys() - read_checkpoint(saved / "plain").keys()
    assert len(extra) == len(strange)


@pytest.mark.parametrize("gone", ["final_layer_norm.weight", "0.self_attn.q_proj.weight", "layers.0.mlp.fc1.bias"])
def test_a_text_encoder_that_lacks_weights_is_opened_and_left_to_the_loader(gone, towers, tmp_path):
    folder = broken(towers[0].parent, tmp_path, "folder")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    save_file({key: weight for key, weight in load_file(file).items() if not key.endswith(gone)}, file)
    assert open_checkpoint(folder).outline


def test_an_index_that_is_no_json_is_an_error(saved, tmp_path):
    folder = broken(saved, tmp_path)
    for content in ("{", "[1]", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (folder / INDEX).write_text(content)
        assert INDEX in refusal(folder)


@pytest.mark.parametrize(("file", "change", "said"), [
    ("unet", {"in_channels": 6}, "reads 6 channels"),
    ("unet", {"attention_head_dim": [2, 3, 4]}, "of one number or of one width"),
    ("unet", {"block_out_channels": None}, "describe no model"),
    ("vae", {"latent_channels": "four"}, "describe no model"),
    ("vae", {"block_out_channels": []}, "describe no model"),
    ("unet", {"attention_head_dim": [4, 4]}, "describe no model"),
])
def test_configs_of_another_kind_of_model_are_told(file, change, said, saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        load_config(folder)


def test_a_schedule_that_the_yaml_cannot_say_is_an_error(saved, tmp_path):
    folder = broken(saved, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    for change in ({"rescale_betas_zero_snr": True}, {"beta_schedule": "sigmoid"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ConfigError, match="--config"):
            load_config(folder)


def test_a_folder_that_is_none_of_theirs_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError):
        load_config(tmp_path)
    assert (GOLDENS / "tiny-clip").is_dir()
    with pytest.raises(CheckpointError, match="layout of diffusers"):
        open_checkpoint(GOLDENS / "tiny-clip")


def test_a_picture_encoder_of_a_folder_has_what_is_left_of_its_text_tower():
    stage = "cond_stage_model.model."
    shapes = {name: shape for name, (shape, _) in manifest("sd-image-variations").items() if name.startswith(stage)}
    pieces = {f"{stage}visual.proj": {0: torch.empty(768, 1024)}}
    add_text_leftovers(pieces, stage)
    assert {name: tuple(own[0].shape) for name, own in pieces.items() if "visual" not in name} == {
        name: shape for name, shape in shapes.items() if "visual" not in name}


@pytest.mark.parametrize("kind", ["variation", "unclip"])
def test_models_that_see_pictures_are_not_written_as_folders(kind, tmp_path):
    checkpoint = write_model(tmp_path, kind)
    with pytest.raises(ConfigError, match="place in th"):
        convert(checkpoint, tmp_path / "folder", config=tmp_path / "config.yaml")
    assert not (tmp_path / "folder").exists()
