"""The configs of a folder in the diffusers layout, read as YAML of ours and written from it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.diffusers import INDEX, OPEN_CLIP_BLOCKS, found, read_json
from ldm.errors import ConfigError

# Our word for each, and theirs.
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

# By how many channels a UNet reads beside the latent: our class and its conditioning, their pipeline.
KINDS = {
    0: ("ldm.models.diffusion.ddpm.LatentDiffusion", "crossattn", "StableDiffusionPipeline"),
    4: ("ldm.models.diffusion.ddpm_edit.LatentDiffusion", "hybrid", "StableDiffusionInstructPix2PixPipeline"),
    5: ("ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "hybrid", "StableDiffusionInpaintPipeline"),
}
READ_ONLY = {
    1: ("ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion", "hybrid", "StableDiffusionDepth2ImgPipeline"),
    3: ("ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "hybrid-adm", "StableDiffusionUpscalePipeline"),
}
UNET, VAE = "ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.autoencoder.AutoencoderKL"
PICTURE_CLIP, PICTURE_UNCLIP, PICTURE_OPEN_CLIP, AUGMENTATION = (f"ldm.modules.encoders.modules.{name}" for name in (
    "FrozenCLIPImageEmbedder", "ClipImageEmbedder", "FrozenOpenCLIPImageEmbedder", "CLIPEmbeddingNoiseAugmentation"))
UPSCALE_DEPTH = "ldm.models.diffusion.ddpm.LatentUpscaleDepthDiffusion"
DEPTH, UPSCALE_2X = "ldm.modules.midas.api.MiDaSInference", "ldm.models.diffusion.ddpm.LatentUpscale2xDiffusion"
K_UNET = "ldm.modules.diffusionmodules.kunet.KUNetModel"
STATES_AND_WHOLE = "ldm.modules.encoders.upscaler.FrozenCLIPStatesAndWhole"
LOW_SCALE = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
UNCLIP = "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion"
CLIP, OPEN_CLIP, OPEN_CLIP_2, NUMBERS, CONDITIONER = (f"ldm.modules.encoders.modules.{name}" for name in (
    "FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "FrozenOpenCLIPEmbedder2", "ConcatTimestepEmbedderND",
    "GeneralConditioner"))
ENGINE, DENOISER = "ldm.models.diffusion.engine.DiffusionEngine", "ldm.modules.diffusionmodules.denoiser"
SCALINGS = {"eps": "EpsScaling", "v": "VScaling"}
TRANSFORMER_LEVELS = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def is_folder(path: str | Path) -> bool:
    return (Path(path) / INDEX).is_file()


# ------------------------------------------------------------------------------------------------------------ to YAML

def to_yaml(folder: Path) -> dict[str, Any]:
    """The config that the JSON files of a folder amount to. Raises ConfigError where there is no such model here."""
    unet = read_json(folder / "unet" / "config.json")
    build = engine_params if unet.get("addition_embed_type") == "text_time" else model_params
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    vae = read_json(folder / "vae" / "config.json")
    try:
        return {"model": build(folder, schedule, unet, vae)}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"the configs in {folder} describe no model that is known here "
                          f"({type(error).__name__}: {error}): name its YAML with --config") from error


def model_params(folder: Path, schedule: Mapping, unet: Mapping, vae: Mapping) -> dict[str, Any]:
    beside = unet["in_channels"] - vae["latent_channels"]
    if beside not in KINDS | READ_ONLY or schedule.get("trained_betas") or schedule.get("rescale_betas_zero_snr"):
        raise ConfigError(f"{folder} is of no kind that is known here (its UNet reads {unet['in_channels']} channels, "
                          f"its scheduler is {schedule.get('_class_name')}): name its YAML with --config")
    target, conditioning, _ = (KINDS | READ_ONLY)[beside]
    params = {
        "linear_start": schedule["beta_start"], "linear_end": schedule["beta_end"],
        "beta_schedule": ours(BETAS, schedule["beta_schedule"]), "timesteps": schedule.get("num_train_timesteps", 1000),
        "parameterization": prediction(schedule),
        "first_stage_key": "jpg", "cond_stage_key": "txt", "num_timesteps_cond": 1, "cond_stage_trainable": False,
        "image_size": unet.get("sample_size") or 64, "channels": vae["latent_channels"],
        "conditioning_key": conditioning, "scale_factor": vae.get("scaling_factor", 0.18215), "use_ema": False,
        "unet_config": {"target": UNET, "params": unet_params(unet)},
        "first_stage_config": {"target": VAE, "params": stage_params(vae)},
        "cond_stage_config": cond_stage(folder),
    }  # fmt: skip
    if (folder / "image_normalizer").is_dir():
        target, params = UNCLIP, params | unclip_params(folder, unet)
    if (folder / "depth_estimator").is_dir():
        params["depth_stage_config"] = depth_stage(read_json(folder / "depth_estimator" / "config.json"))
    if vae["in_channels"] == 4 and beside == vae["latent_channels"]:
        target, params = UPSCALE_DEPTH, params | {"enlarges": 2}
        if classes := unet.get("num_class_embeds"):
            params["conditioning_key"] = "hybrid-adm"
            params["unet_config"]["params"]["num_classes"] = classes
    elif (folder / "low_res_scheduler").is_dir():
        params |= low_scale_params(folder, unet)
    if unet.get("time_embedding_type") == "fourier":
        target, params = UPSCALE_2X, params | latent_upscaler_params(params, unet)
    return {"target": target, "params": params}


def depth_stage(theirs: Mapping) -> dict[str, Any]:
    """The network that sees the depth of a picture."""
    stem = theirs["backbone_config"]
    widths = stem.get("hidden_sizes", (256, 512, 1024))
    return {"target": DEPTH, "params": {
        "model_type": "dpt_hybrid", "side": theirs["image_size"], "stem": stem.get("embedding_size", 64),
        "stages": [list(stage) for stage in zip(widths, stem["depths"])], "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"], "heads": theirs["num_attention_heads"],
        "hooks": list(theirs["backbone_out_indices"][2:]), "features": theirs["fusion_hidden_size"]}}  # fmt: skip


def low_scale_params(folder: Path, unet: Mapping) -> dict[str, Any]:
    """Of the x4 upscaler, whose UNet is also told how much noise was added to the small picture."""
    schedule = read_json(folder / "low_res_scheduler" / "scheduler_config.json")
    levels = {"linear_start": schedule["beta_start"], "linear_end": schedule["beta_end"],
              "beta_schedule": ours(BETAS, schedule["beta_schedule"])}
    only = unet.get("only_cross_attention", False)
    network = {"num_classes": unet["num_class_embeds"],
               "disable_self_attentions": [only] * len(unet["block_out_channels"]) if isinstance(only, bool) else only}
    return {
        "low_scale_key": "lr", "low_scale_config": {"target": LOW_SCALE, "params": {
            "noise_schedule_config": levels, "max_noise_level": read_json(folder / INDEX).get("max_noise_level", 350)}},
        "unet_config": {"target": UNET, "params": unet_params(unet) | network},
    }  # fmt: skip


def latent_upscaler_params(params: Mapping, unet: Mapping) -> dict[str, Any]:
    """Of the x2 latent upscaler, whose UNet is one of k-diffusion."""
    widths = unet["block_out_channels"]
    network = {
        "in_channels": unet["in_channels"], "out_channels": unet["out_channels"], "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths], "num_res_blocks": unet["layers_per_block"],
        "num_head_channels": unet["attention_head_dim"], "context_dim": unet["cross_attention_dim"],
        "cond_channels": unet["time_cond_proj_dim"],
    }  # fmt: skip
    return {
        "conditioning_key": "hybrid-adm", "parameterization": "v", "enlarges": 2,
        "unet_config": {"target": K_UNET, "params": network},
        "cond_stage_config": {**params["cond_stage_config"], "target": STATES_AND_WHOLE},
    }  # fmt: skip


def cond_stage(folder: Path) -> dict[str, Any]:
    """What encodes the condition: texts, or pictures where there is no text encoder."""
    if (folder / "text_encoder").is_dir() or not (folder / "image_encoder").is_dir():
        return text_stage(folder, read_json(folder / "text_encoder" / "config.json"))
    return picture_stage(folder, PICTURE_CLIP)


def unclip_params(folder: Path, unet: Mapping) -> dict[str, Any]:
    """Of Stable unCLIP, whose UNet is also told what a picture shows and how much noise was added to that."""
    schedule = read_json(folder / "image_noising_scheduler" / "scheduler_config.json")
    dim = read_json(folder / "image_normalizer" / "config.json")["embedding_dim"]
    levels = {"timesteps": schedule.get("num_train_timesteps", 1000),
              "beta_schedule": ours(BETAS, schedule["beta_schedule"]),
              "linear_start": schedule.get("beta_start", 1e-4), "linear_end": schedule.get("beta_end", 2e-2)}
    network = {"num_classes": "sequential", "adm_in_channels": unet["projection_class_embeddings_input_dim"]}
    return {
        "conditioning_key": "crossattn-adm", "embedder_config": picture_stage(folder, PICTURE_UNCLIP),
        "noise_aug_config": {"target": AUGMENTATION, "params": {
            "timestep_dim": dim, "max_noise_level": levels["timesteps"], "noise_schedule_config": levels}},
        "unet_config": {"target": UNET, "params": unet_params(unet) | network},
    }  # fmt: skip


def picture_stage(folder: Path, target: str) -> dict[str, Any]:
    """The picture encoder: one that is known by name, else as the folder describes it, as a `target`."""
    path = folder / "image_encoder"
    theirs = read_json(path / "config.json")
    match theirs["hidden_size"], theirs["num_hidden_layers"], theirs.get("hidden_act", "quick_gelu"):
        case 1024, 24, "quick_gelu":
            return {"target": target, "params": {"model": "ViT-L/14"}}
        case 1280, 32, "gelu":
            return {"target": PICTURE_OPEN_CLIP}
    return {"target": target, "params": {"model": str(path)}}


def engine_params(folder: Path, schedule: Mapping, unet: Mapping, vae: Mapping) -> dict[str, Any]:
    """Of Stable Diffusion XL, whose UNet is also told a vector of the text, sizes, and a score or not."""
    if ours(BETAS, schedule["beta_schedule"]) != "linear" or schedule.get("rescale_betas_zero_snr"):
        raise ConfigError(f"{folder} has a noise schedule that is not known here: name its YAML with --config")
    index = read_json(folder / INDEX)
    scored = "aesthetic_score" if index.get("requires_aesthetics_score") else "target_size_as_tuple"
    numbers = {"target": NUMBERS, "params": {"outdim": unet["addition_time_embed_dim"]}}
    levels = {"linear_start": schedule["beta_start"], "linear_end": schedule["beta_end"],
              "num_timesteps": schedule.get("num_train_timesteps", 1000)}  # fmt: skip
    network = {"num_classes": "sequential", "adm_in_channels": unet["projection_class_embeddings_input_dim"]}
    params = {
        "scale_factor": vae.get("scaling_factor", 0.13025), "image_size": unet.get("sample_size") or 128,
        "channels": vae["latent_channels"],
        "denoiser_config": {"target": f"{DENOISER}.DiscreteDenoiser", "params": {
            "num_idx": levels["num_timesteps"],
            "scaling_config": {"target": f"{DENOISER}.{SCALINGS[prediction(schedule)]}"},
            "discretization_config": {"target": f"{DENOISER}.LegacyDDPMDiscretization", "params": levels}}},
        "network_config": {"target": UNET, "params": unet_params(unet) | network},
        "first_stage_config": {"target": VAE, "params": stage_params(vae)},
        "conditioner_config": {"target": CONDITIONER, "params": {
            "emb_models": [
                *({"input_key": "txt", **stage} for stage in text_stages(folder)),
                *({"input_key": key, **numbers} for key in ("original_size_as_tuple", "crop_coords_top_left", scored))],
            "zero_empty": index.get("force_zeros_for_empty_prompt", True)}},
    }  # fmt: skip
    return {"target": ENGINE, "params": params}


def text_stages(folder: Path) -> Iterator[dict[str, Any]]:
    """One or both text encoders of Stable Diffusion XL, of which the states before the last block are used."""
    if (folder / "text_encoder").is_dir():
        theirs = read_json(folder / "text_encoder" / "config.json")
        stage = clip_stage(folder, theirs)
        penultimate = {"layer": "hidden", "layer_idx": theirs["num_hidden_layers"] - 1}
        yield {**stage, "params": stage.get("params", {}) | penultimate}
    path = folder / "text_encoder_2"
    theirs = read_json(path / "config.json")
    same = (theirs["hidden_size"], theirs["num_hidden_layers"], theirs.get("hidden_act")) == (1280, 32, "gelu")
    yield {"target": OPEN_CLIP_2, "params": {
        "arch": "ViT-bigG-14" if same else str(path), "layer": "penultimate", "always_return_pooled": True,
        "legacy": False}}  # fmt: skip


def prediction(schedule: Mapping) -> str:
    return ours(PREDICTIONS, schedule.get("prediction_type", "epsilon"))


def unet_params(theirs: Mapping) -> dict[str, Any]:
    widths = theirs["block_out_channels"]
    return {
        "image_size": theirs.get("sample_size") or 64, "in_channels": theirs["in_channels"],
        "out_channels": theirs["out_channels"], "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths], "num_res_blocks": theirs["layers_per_block"],
        "attention_resolutions": [2**level for level, kind in reversed([*enumerate(theirs["down_block_types"])])
                                  if kind == TRANSFORMER_LEVELS[0][0]],
        "use_spatial_transformer": True, "use_linear_in_transformer": bool(theirs.get("use_linear_projection")),
        "transformer_depth": theirs.get("transformer_layers_per_block", 1),
        "context_dim": theirs["cross_attention_dim"], "use_checkpoint": False, "legacy": False,
        **heads(theirs.get("num_attention_heads") or theirs["attention_head_dim"], widths),
    }  # fmt: skip


def heads(theirs: int | list[int], widths: list[int]) -> dict[str, int]:
    """Heads of the same number, or of the same width, at every level; what they call the width is the number."""
    counts = [theirs] * len(widths) if isinstance(theirs, int) else theirs
    each = {width // count for width, count in zip(widths, counts, strict=True)}
    if len(set(counts)) == 1:
        return {"num_heads": counts[0]}
    if len(each) > 1:
        raise ConfigError(f"attention heads are of one number or of one width, got {counts} of {widths} channels")
    return {"num_head_channels": each.pop()}


def stage_params(theirs: Mapping) -> dict[str, Any]:
    widths = theirs["block_out_channels"]
    return {
        "embed_dim": theirs["latent_channels"], "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True, "z_channels": theirs["latent_channels"], "resolution": theirs.get("sample_size", 256),
            "in_channels": theirs["in_channels"], "out_ch": theirs["out_channels"], "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": theirs["layers_per_block"],
            "attn_resolutions": [], "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }  # fmt: skip


def text_stage(folder: Path, theirs: Mapping) -> dict[str, Any]:
    """The text encoder: one that is known by name, else as the folder describes it."""
    if theirs["hidden_size"] in OPEN_CLIP_BLOCKS:
        skipped = theirs["num_hidden_layers"] < OPEN_CLIP_BLOCKS[theirs["hidden_size"]]
        return {"target": OPEN_CLIP, "params": {"freeze": True, "layer": "penultimate" if skipped else "last"}}
    return clip_stage(folder, theirs)


def clip_stage(folder: Path, theirs: Mapping) -> dict[str, Any]:
    if (theirs["hidden_size"], theirs["num_hidden_layers"], theirs.get("hidden_act")) == (768, 12, "quick_gelu"):
        return {"target": CLIP}
    return {"target": CLIP, "params": {"version": str(folder / "text_encoder")}}


def ours(words: Mapping[str, str], theirs: str) -> str:
    """Our word for theirs. Raises KeyError for one that there is no word for."""
    return {word: own for own, word in words.items()}[theirs]


# ---------------------------------------------------------------------------------------------------------- from YAML

def from_yaml(section: Mapping, text: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """{file in the folder: its JSON} for the model of a `model:` section, given as plain containers.

    text: the text encoder's weights under their names, for their shapes alone. Raises ConfigError where their layout
    has no such model.
    """
    try:
        params = section["params"]
        unet, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
        beside = unet["in_channels"] - stage["ddconfig"]["z_channels"]
        other = unet.get("num_classes") or stage["ddconfig"].get("attn_resolutions")
        if beside not in KINDS or not unet.get("use_spatial_transformer") or other:
            raise ConfigError("only Stable Diffusion 1 and 2, their inpainting models and InstructPix2Pix have a "
                              "place in that layout")
        return {
            INDEX: index(KINDS[beside][2] if stage["ddconfig"]["out_ch"] == 3 else "StableDiffusionLDM3DPipeline"),
            "scheduler/scheduler_config.json": schedule_config(params),
            "text_encoder/config.json": text_config(params["cond_stage_config"], text),
            "unet/config.json": unet_config(unet, params.get("image_size", 64)),
            "vae/config.json": stage_config(stage["ddconfig"], params.get("scale_factor", 1.0)),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the config does not describe a Stable Diffusion model: {error!r} is missing") from error


def index(pipeline: str) -> dict[str, Any]:
    return {
        "_class_name": pipeline, "_diffusers_version": "0.35.0", "feature_extractor": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip


def schedule_config(params: Mapping) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler", "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2), "beta_schedule": BETAS[params.get("beta_schedule", "linear")],
        "num_train_timesteps": params.get("timesteps", 1000), "clip_sample": False, "set_alpha_to_one": False,
        "steps_offset": 1, "prediction_type": PREDICTIONS[params.get("parameterization", "eps")],
    }  # fmt: skip


def unet_config(params: Mapping, image_size: int) -> dict[str, Any]:
    widths = [params["model_channels"] * factor for factor in params["channel_mult"]]
    width = params.get("num_head_channels", -1)
    plain = [int(2**level not in params["attention_resolutions"]) for level in range(len(widths))]
    down, up = TRANSFORMER_LEVELS
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": image_size, "in_channels": params["in_channels"],
        "out_channels": params["out_channels"], "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"], "cross_attention_dim": params["context_dim"],
        "attention_head_dim": params["num_heads"] if width == -1 else [channels // width for channels in widths],
        "down_block_types": [down[level] for level in plain], "up_block_types": [up[level] for level in plain[::-1]],
        "use_linear_projection": bool(params.get("use_linear_in_transformer")),
        "transformer_layers_per_block": params.get("transformer_depth", 1),
    }  # fmt: skip


def stage_config(ddconfig: Mapping, scale_factor: float) -> dict[str, Any]:
    levels = len(ddconfig["ch_mult"])
    return {
        "_class_name": "AutoencoderKL", "sample_size": ddconfig["resolution"], "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"], "latent_channels": ddconfig["z_channels"],
        "block_out_channels": [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]],
        "layers_per_block": ddconfig["num_res_blocks"], "scaling_factor": scale_factor,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def text_config(stage: Mapping, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The text encoder's JSON: the one of the folder that the YAML names, else from the shapes, by CLIP's habits."""
    params = stage.get("params") or {}
    version = str(params.get("version", ""))
    if version and (Path(version) / "config.json").is_file():
        given = read_json(Path(version) / "config.json")
        return given.get("text_config") or given
    words, width = weights["text_model.embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": words, "hidden_size": width,
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "num_hidden_layers": len(found(weights, r"text_model\.encoder\.layers\.(\d+)\.")),
        "num_attention_heads": width // 64, "projection_dim": width, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu" if stage["target"] == OPEN_CLIP or "laion" in version else "quick_gelu",
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
