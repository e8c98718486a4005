"""Tiny models on disk, with weights by the contract's rule, for tests that run whole commands."""

from pathlib import Path

import fill
import torch
from depth import SIZES
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from support import GOLDENS

from ldm.util import instantiate_from_config

TEXT_ENCODER = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"version": str(GOLDENS / "tiny-clip")},
}
VQ_STAGE = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 4, "n_embed": 64, "monitor": "val/rec_loss",
        "ddconfig": {"double_z": False, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
                     "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}  # fmt: skip


CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 64, "n_classes": 11, "key": "class_label"},
}

DEPTH_STAGE = {
    "target": "ldm.modules.midas.api.MiDaSInference",
    "params": {"model_type": "dpt_hybrid", **SIZES},
}
TOWER = {
    "target": "ldm.modules.encoders.modules.ClipImageEmbedder",
    "params": {"model": str(Path(__file__).parent / "tiny-vision")},
}
AUGMENTATION = {
    "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
    "params": {"timestep_dim": 64, "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}},
}

LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02}, "max_noise_level": 350},
}

K_UNET = {"model_channels": 64, "channel_mult": [1, 2, 2], "num_res_blocks": 2, "num_head_channels": 32,
          "context_dim": 64, "cond_channels": 192}  # fmt: skip

SD = Path(__file__).resolve().parents[1] / "configs" / "stable-diffusion"


def embedder(name: str, key: str, **params) -> dict:
    return {"target": f"sgm.modules.encoders.modules.{name}", "input_key": key, "params": params}


def xl(last: str, *texts: dict) -> dict:
    """What makes a config of Stable Diffusion XL tiny: the key of the last number that it is told, its text encoders
    beside OpenCLIP's."""
    words = str(GOLDENS / "tiny-clip")
    big = embedder("FrozenOpenCLIPEmbedder2", "txt", arch=words, layer="penultimate", always_return_pooled=True,
                   legacy=False)  # fmt: skip
    keys = ("original_size_as_tuple", "crop_coords_top_left", last)
    numbers = 5 if last == "aesthetic_score" else 6
    network = {"adm_in_channels": 64 + 8 * numbers, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
               "attention_resolutions": [2], "num_head_channels": 16, "transformer_depth": [1, 2],
               "context_dim": 64 * (1 + len(texts))}
    stage = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "resolution": 64}
    return {
        "image_size": 16, "conditioner_config.params.emb_models": [
            *texts, big, *(embedder("ConcatTimestepEmbedderND", key, outdim=8) for key in keys)],
        **{f"network_config.params.{name}": value for name, value in network.items()},
        **{f"first_stage_config.params.ddconfig.{name}": value for name, value in stage.items()},
    }  # fmt: skip


# What each kind of model changes in the params of a golden config; `target` is that of the model itself.
KINDS = {
    "text": ("tiny", {"cond_stage_config": TEXT_ENCODER}),
    "v": ("tiny-v2", {"cond_stage_config": TEXT_ENCODER}),
    "inpaint": ("tiny-inpaint", {"cond_stage_config": TEXT_ENCODER}),
    "edit": ("tiny", {
        "target": "ldm.models.diffusion.ddpm_edit.LatentDiffusion", "cond_stage_config": TEXT_ENCODER,
        "cond_stage_key": "edit", "conditioning_key": "hybrid", "unet_config.params.in_channels": 8,
    }),
    "depth": ("tiny-inpaint", {
        "target": "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion", "cond_stage_config": TEXT_ENCODER,
        "depth_stage_config": DEPTH_STAGE, "unet_config.params.in_channels": 5,
    }),
    "x4": ("tiny-v2", {
        "target": "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "cond_stage_config": TEXT_ENCODER,
        "low_scale_config": LOW_SCALE, "low_scale_key": "lr", "conditioning_key": "hybrid-adm",
        "linear_start": 0.0001, "linear_end": 0.02, "scale_factor": 0.08333,
        "unet_config.params.in_channels": 7, "unet_config.params.num_classes": 1000,
        "unet_config.params.disable_self_attentions": [True, True, False],
        "unet_config.params.attention_resolutions": [2, 4],
    }),
    "x2": ("tiny-v2", {
        "target": "ldm.models.diffusion.ddpm.LatentUpscale2xDiffusion", "conditioning_key": "hybrid-adm",
        "cond_stage_config": TEXT_ENCODER | {"target": "ldm.modules.encoders.upscaler.FrozenCLIPStatesAndWhole"},
        "enlarges": 2, "unet_config": {"target": "ldm.modules.diffusionmodules.kunet.KUNetModel", "params": K_UNET},
    }),
    "pairs": ("tiny-concat", {"cond_stage_config": "__is_first_stage__", "first_stage_config": VQ_STAGE}),
    "unconditional": ("tiny-concat", {
        "cond_stage_config": "__is_unconditional__", "conditioning_key": None, "unet_config.params.in_channels": 4,
    }),
    "rgbd": ("tiny", {
        "cond_stage_config": TEXT_ENCODER,
        **{f"first_stage_config.params.ddconfig.{name}": 6 for name in ("in_channels", "out_ch")},
    }),
    "variation": ("tiny", {"cond_stage_config": TOWER, "cond_stage_key": "image"}),
    "unclip": ("tiny-v2", {
        "target": "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion",
        "cond_stage_config": TEXT_ENCODER, "conditioning_key": "crossattn-adm", "embedder_config": TOWER,
        "noise_aug_config": AUGMENTATION, "unet_config.params.num_classes": "sequential",
        "unet_config.params.adm_in_channels": 128,
    }),
    "rgbd-x2": ("tiny", {
        "target": "ldm.models.diffusion.ddpm.LatentUpscaleDepthDiffusion", "cond_stage_config": TEXT_ENCODER,
        "conditioning_key": "hybrid", "enlarges": 2, "unet_config.params.in_channels": 8,
        **{f"first_stage_config.params.ddconfig.{name}": 4 for name in ("in_channels", "out_ch")},
    }),
    "xl": (f"{SD}/sd_xl_base", xl(
        "target_size_as_tuple",
        embedder("FrozenCLIPEmbedder", "txt", version=str(GOLDENS / "tiny-clip"), layer="hidden", layer_idx=1))),
    "refiner": (f"{SD}/sd_xl_refiner", xl("aesthetic_score")),
    "classes": ("tiny", {"cond_stage_config": CLASSES, "cond_stage_key": "class_label"}),
}  # fmt: skip


def tiny_config(kind: str) -> DictConfig:
    """The config of a tiny model (64x64 pixels)."""
    golden, changes = KINDS[kind]
    config = OmegaConf.load(GOLDENS / f"{golden}.yaml")
    for name, value in changes.items():
        OmegaConf.update(config.model, name if name == "target" else f"params.{name}", value, merge=False)
    return config


def write_model(folder: Path, kind: str = "text", suffix: str = ".ckpt") -> Path:
    """Write `model<suffix>` and `config.yaml` of a tiny model (64x64 pixels), and give the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(kind)
    OmegaConf.save(config, folder / "config.yaml")
    state = fill.fill_module(instantiate_from_config(config.model), salt=0).state_dict()
    path = folder / f"model{suffix}"
    if suffix == ".safetensors":
        save_file({key: weight.contiguous() for key, weight in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 0}, path)
    return path


def write_clip(folder: Path) -> Path:
    """Write a tiny CLIP with both towers, 32x32 pixels, as transformers does, and give its folder."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**shape, "vocab_size": 800, "bos_token_id": 798, "eos_token_id": 799, "pad_token_id": 799}
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((GOLDENS / "tiny-clip" / name).read_bytes())
    return folder
