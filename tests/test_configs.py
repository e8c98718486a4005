"""The shipped YAML: every model that it describes can be built."""

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from support import manifest

from ldm.checkpoint import UNKNOWN, identify
from ldm.config import load_config
from ldm.errors import ConfigError
from ldm.models.load import build_model

ROOT = Path(__file__).parent.parent
CONFIGS = [
    "autoencoder/autoencoder_kl_8x8x64", "autoencoder/autoencoder_kl_16x16x16", "autoencoder/autoencoder_kl_32x32x4",
    "autoencoder/autoencoder_kl_64x64x3", "latent-diffusion/celebahq-ldm-vq-4", "latent-diffusion/cin-ldm-vq-f8",
    "latent-diffusion/cin256-v2", "latent-diffusion/ffhq-ldm-vq-4", "latent-diffusion/lsun_bedrooms-ldm-vq-4",
    "latent-diffusion/lsun_churches-ldm-kl-8", "latent-diffusion/txt2img-1p4B-eval",
    "retrieval-augmented-diffusion/768x768", "stable-diffusion/ldm3d", "stable-diffusion/ldm3d-4c",
    "stable-diffusion/sd-image-variations", "stable-diffusion/v1-inference",
    "stable-diffusion/v1-inpainting-inference", "stable-diffusion/v2-inference", "stable-diffusion/v2-inference-v",
    "stable-diffusion/v2-inpainting-inference", "stable-diffusion/v2-midas-inference",
    "stable-diffusion/x4-upscaling",
    "stable-diffusion/v2-1-stable-unclip-h-inference",
    "stable-diffusion/v2-1-stable-unclip-l-inference",
    "stable-diffusion/sd_xl_base", "stable-diffusion/sd_xl_refiner",
]  # fmt: skip
FIRST_STAGES = ["kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16"]
MODELS = [
    "bsr_sr", "celeba256", "cin256", "ffhq256", "inpainting_big", "layout2img-openimages256", "lsun_beds256",
    "lsun_churches256", "semantic_synthesis256", "semantic_synthesis512", "text2img256",
]  # fmt: skip
ORIGINAL = [
    *(f"configs/{name}.yaml" for name in CONFIGS),
    *(f"models/first_stage_models/{name}/config.yaml" for name in FIRST_STAGES),
    *(f"models/ldm/{name}/config.yaml" for name in MODELS),
]
# The stages of a recipe build on what the stage before them has trained: tests/training runs them.
RECIPES = "configs/shapes/"
FOUND = (str(path.relative_to(ROOT)) for top in ("configs", "models") for path in (ROOT / top).rglob("*.yaml"))
SHIPPED = sorted(path for path in FOUND if not path.startswith(RECIPES))
LAYOUTS = {
    "configs/stable-diffusion/v1-inference.yaml": "sd-v1",
    "configs/stable-diffusion/v1-inpainting-inference.yaml": "sd-v1-inpainting",
    "configs/stable-diffusion/v2-inference.yaml": "sd-v2-base",
    "configs/stable-diffusion/v2-inference-v.yaml": "sd-v2-v",
    "configs/stable-diffusion/v2-inpainting-inference.yaml": "sd-v2-inpainting",
    "configs/stable-diffusion/v2-midas-inference.yaml": "sd-v2-depth",
    "configs/stable-diffusion/x4-upscaling.yaml": "sd-x4-upscaler",
    "configs/stable-diffusion/sd-image-variations.yaml": "sd-image-variations",
    "configs/stable-diffusion/sd_xl_base.yaml": "sdxl-base",
    "configs/stable-diffusion/sd_xl_refiner.yaml": "sdxl-refiner",
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": "ldm-txt2img-1p4B",
}


@cache
def built(path: str) -> tuple[torch.nn.Module, list[str]]:
    """The model of a shipped config, and the warnings that building it gave."""
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("ldm").addHandler(handler)
    try:
        return build_model(ROOT / path), warnings
    finally:
        logging.getLogger("ldm").removeHandler(handler)


def test_the_configs_of_the_original_are_at_their_paths():
    assert not set(ORIGINAL) - set(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED)
def test_the_model_of_every_shipped_config_is_built_without_memory_or_complaint(path):
    model, warnings = built(path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not warnings


@pytest.mark.parametrize("path", ORIGINAL)
def test_the_family_of_each_original_model_is_in_the_table(path):
    family = identify({key: tuple(weight.shape) for key, weight in built(path)[0].state_dict().items()})
    assert family is not UNKNOWN
    assert family.config is not None


@pytest.mark.parametrize(("path", "layout"), LAYOUTS.items())
def test_a_config_builds_exactly_the_weights_of_its_published_checkpoint(path, layout):
    state = built(path)[0].state_dict()
    ours = {key: (tuple(weight.shape), str(weight.dtype).removeprefix("torch.")) for key, weight in state.items()}
    assert ours == manifest(layout)


def test_instruct_pix2pix_has_the_weights_of_v1_and_four_more_input_channels():
    v1, edit = (built(f"configs/stable-diffusion/{name}.yaml")[0].state_dict()
                for name in ("v1-inference", "instruct-pix2pix"))
    assert edit.keys() == v1.keys()
    grown = {key: tuple(weight.shape) for key, weight in edit.items() if weight.shape != v1[key].shape}
    assert grown == {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}


def test_the_parts_of_v1_have_the_sizes_that_are_known_of_it():
    model, _ = built("configs/stable-diffusion/v1-inference.yaml")
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [859_520_964, 83_653_863, 123_060_480]


def test_data_that_does_not_exist_here_does_not_keep_a_model_from_loading():
    path = ROOT / "models/first_stage_models/kl-f8/config.yaml"
    config = load_config(path)
    config.data.params.train.target = "ldm.data.nowhere.Pictures"
    assert isinstance(build_model(config), torch.nn.Module)


@pytest.mark.parametrize(("change", "said"), [
    ({"target": "ldm.models.autoencoder.AutoencoderXL"}, "AutoencoderXL"),
    ({"target": "nowhere.at.all.Model"}, "nowhere"),
    ({"params": {"embed_dim": 4, "colour": "red"}}, "colour"),
    ({"params": {"embed_dim": 4, "ddconfig": {"ch": 32}}}, "cannot|argument"),
])
def test_a_model_section_that_cannot_be_built_is_a_config_error_that_says_what_is_wrong(change, said, tmp_path):
    config = load_config(ROOT / "models/first_stage_models/kl-f8/config.yaml")
    for key, value in change.items():
        config.model[key] = value
    with pytest.raises(ConfigError, match=said):
        build_model(config)
