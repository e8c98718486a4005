import pytest
from omegaconf import OmegaConf

from ldm.config import load_config, model_section
from ldm.errors import ConfigError, RequestError
from ldm.generation.geometry import Geometry, geometry
from ldm.generation.options import REPOSITORY
from ldm.generation.request import Request

SD = Geometry(channels=4, factor=8, side=512, step=64)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("configs/stable-diffusion/v1-inference.yaml", SD),
        ("configs/stable-diffusion/v1-inpainting-inference.yaml", SD),
        ("configs/stable-diffusion/v2-inference-v.yaml", SD),
        ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", Geometry(4, 8, 256, 64)),
        ("configs/latent-diffusion/cin256-v2.yaml", Geometry(3, 4, 256, 32)),
        ("models/ldm/inpainting_big/config.yaml", Geometry(3, 4, 256, 32)),
        ("models/ldm/lsun_churches256/config.yaml", Geometry(4, 8, 256, 128)),
        ("models/ldm/celeba256/config.yaml", Geometry(3, 4, 256, 32)),
    ],
)
def test_the_sizes_of_a_model_are_read_from_its_config(config, sizes):
    assert geometry(model_section(load_config(REPOSITORY / config))) == sizes


def test_a_model_with_a_size_for_each_side_works_at_the_longer(pipeline):
    section = model_section(load_config(REPOSITORY / "configs/stable-diffusion/v1-inference.yaml"))
    OmegaConf.update(section, "params.image_size", [48, 64])
    assert geometry(section).side == 512


@pytest.mark.parametrize("missing", ["params", "params.first_stage_config", "params.unet_config"])
def test_a_section_that_describes_no_latent_diffusion_model_says_which_file_and_what_is_missing(missing):
    section = model_section(load_config(REPOSITORY / "configs/stable-diffusion/v1-inference.yaml"))
    parent, _, name = missing.rpartition(".")
    del (OmegaConf.select(section, parent) if parent else section)[name]
    with pytest.raises(ConfigError, match=f"mine.yaml does not describe a latent diffusion model.*{name}") as caught:
        geometry(section, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_request_without_a_size_gets_the_models_own():
    assert SD.size(Request()) == (512, 512)
    assert SD.size(Request(width=768)) == (768, 512)
    assert SD.latent(768, 512) == (4, 64, 96)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"width": 500}, "W .* 64, got 500; try 512"), ({"height": 65}, "H .* 64, got 65; try 64")]
)
def test_a_side_that_is_no_multiple_of_the_step_is_refused_by_the_name_of_its_option(wrong, message):
    with pytest.raises(RequestError, match=message):
        SD.size(Request(**wrong))


def test_what_the_command_line_says_of_the_latents_must_agree():
    SD.check(4, 8)
    SD.check(None, None)
    with pytest.raises(RequestError, match="C is 4 in this model, got 3; leave the option out"):
        SD.check(3, 8)
    with pytest.raises(RequestError, match="f is 8 in this model, got 16"):
        SD.check(4, 16)
