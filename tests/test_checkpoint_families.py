"""A checkpoint tells what it is."""

from pathlib import Path

import pytest
from support import manifest

from ldm.checkpoint import FAMILIES, UNKNOWN, identify

NAMES = {
    "sd-v1": "Stable Diffusion 1",
    "sd-v1-full-ema": "Stable Diffusion 1",
    "sd-v1-inpainting": "Stable Diffusion 1.5 inpainting",
    "sd-v2-base": "Stable Diffusion 2",
    "sd-v2-v": "Stable Diffusion 2",
    "sd-v2-inpainting": "Stable Diffusion 2 inpainting",
    "sd-v2-depth": "Stable Diffusion 2 depth-to-image",
    "sd-x4-upscaler": "Stable Diffusion x4 upscaler",
    "sdxl-base": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sd-image-variations": "Stable Diffusion image variations",
    "ldm-txt2img-1p4B": "latent-diffusion text-to-image 1.45B",
}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in manifest(name).items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_published_layout_is_told_by_its_weights(name):
    assert identify(shapes(name)).name == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_stable_diffusion_2_and_xl_carry_their_own_watermark(name):
    own = {"sd-v2": "SDV2", "sd-x4": "SDV2", "sdxl-": "0xb3ec907bb19e"}
    assert identify(shapes(name)).watermark == own.get(name[:5], "StableDiffusionV1")


def test_a_text_encoder_without_its_inner_name_is_still_sd_1():
    renamed = {key.replace(".text_model.", "."): shape for key, shape in shapes("sd-v1").items()}
    assert identify(renamed).name == "Stable Diffusion 1"


def test_instruct_pix2pix_is_sd_1_with_eight_channels():
    first = "model.diffusion_model.input_blocks.0.0.weight"
    family = identify(shapes("sd-v1") | {first: (320, 8, 3, 3)})
    assert (family.name, family.script) == ("InstructPix2Pix", "scripts/edit.py")


@pytest.mark.parametrize(("channels", "name"), [(6, "LDM3D"), (4, "LDM3D-4C")])
def test_an_autoencoder_that_also_draws_depth_makes_it_ldm3d(channels, name):
    family = identify(shapes("sd-v1") | {"first_stage_model.decoder.conv_out.weight": (channels, 128, 3, 3)})
    assert family.name == name
    assert family.script == "scripts/txt2img.py"


def test_an_upscaler_of_pictures_with_depth_is_no_instruct_pix2pix():
    latents = {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}
    depth = {"first_stage_model.decoder.conv_out.weight": (4, 128, 3, 3)}
    assert identify(shapes("sd-v1") | latents | depth).name == "LDM3D upscaler"


@pytest.mark.parametrize(("width", "letter"), [(2048, "h"), (1536, "l")])
def test_stable_unclip_is_told_by_the_width_of_what_it_sees(width, letter):
    family = identify(shapes("sd-v2-v") | {"model.diffusion_model.label_emb.0.0.weight": (1280, width)})
    assert family.config == f"configs/stable-diffusion/v2-1-stable-unclip-{letter}-inference.yaml"
    assert family.script == "scripts/variation.py"


def test_a_single_autoencoder_is_told_by_its_latent():
    stage = "first_stage_model."
    alone = {key.removeprefix(stage): shape for key, shape in shapes("sd-v1").items() if key.startswith(stage)}
    assert identify(alone).config == "models/first_stage_models/kl-f8/config.yaml"


def test_adapters_are_told_from_models():
    for name in ("lora_unet_down_blocks_0_proj_in.lora_down.weight", "unet.down_blocks.0.to_q.lora_A.weight",
                 "base_model.model.to_q.lora_B.weight", "down_blocks.0.processor.to_q_lora.down.weight"):
        assert identify({name: (4, 320)}).advice() == "add it to a model with --lora FILE"
    for embedding in ({"<cat>": (768,)}, {"emb_params": (2, 768)}, {"clip_l": (1, 768), "clip_g": (1, 1280)}):
        assert identify(embedding).advice() == "add its word to a model with --embedding FILE"
    assert identify({"control_model.time_embed.0.weight": (1280, 320), **shapes("sd-v1")}).name == "ControlNet"


def test_what_no_row_fits_is_unknown_and_has_no_config():
    tiny = {"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3)}
    assert identify(tiny) is identify({}) is UNKNOWN
    assert UNKNOWN.config is None


def test_every_config_that_a_family_names_is_shipped():
    root = Path(__file__).parent.parent
    assert not [family.config for family in FAMILIES if family.config and not (root / family.config).is_file()]


def test_the_advice_names_the_config_and_the_script():
    assert identify(shapes("sd-v1-inpainting")).advice() == (
        "use configs/stable-diffusion/v1-inpainting-inference.yaml with scripts/inpaint.py")
