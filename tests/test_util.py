import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import ConfigError, MissingExtra
from ldm.util import (
    count_params,
    current_target,
    default,
    exists,
    get_obj_from_str,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
    mean_flat,
    optional,
    parallel_data_prefetch,
)


def double(chunk):
    return np.asarray(chunk) * 2


def test_a_config_builds_its_target_with_its_params():
    config = OmegaConf.create({"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}})
    layer = instantiate_from_config(config)
    assert layer.weight.shape == (2, 3)


def test_params_may_be_absent_or_empty():
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), torch.nn.Identity)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity", "params": None}), torch.nn.Identity)


@pytest.mark.parametrize("word", ["__is_first_stage__", "__is_unconditional__"])
def test_the_two_words_for_no_stage_build_nothing(word):
    assert instantiate_from_config(word) is None


def test_a_config_without_target_is_a_key_error():
    with pytest.raises(KeyError, match="target"):
        instantiate_from_config({"params": {}})


@pytest.mark.parametrize("target", ["no.such.Thing", "torch.nn.NoSuchLayer", "Thing", "ldm.no_such_module.Thing"])
def test_an_unknown_target_is_named(target):
    with pytest.raises(ConfigError, match=target.rsplit(".", 1)[-1]):
        get_obj_from_str(target)


def test_an_import_that_fails_inside_a_target_is_not_taken_for_an_unknown_target(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        get_obj_from_str("half_broken.Thing")


def test_prefixes_of_older_yaml_files_lead_to_where_things_live_now():
    assert current_target("main.DataModuleFromConfig") == "ldm.training.DataModuleFromConfig"
    assert current_target("taming.data.faceshq.CelebAHQTrain") == "ldm.data.faceshq.CelebAHQTrain"
    assert current_target("torch.nn.Identity") == "torch.nn.Identity"
    edit = "stable_diffusion.ldm.models.diffusion.ddpm_edit.LatentDiffusion"
    assert get_obj_from_str(edit).__name__ == "LatentEditDiffusion"


def test_default_calls_plain_functions_only():
    assert default(1, lambda: 2) == 1
    assert default(None, lambda: 2) == 2
    assert default(None, dict) is dict
    assert default(0, 5) == 0
    assert exists(0) and not exists(None)


def test_pictures_and_maps_are_told_by_their_channels():
    picture, segmentation = torch.zeros(1, 3, 4, 4), torch.zeros(1, 7, 4, 4)
    assert isimage(picture) and not ismap(picture)
    assert ismap(segmentation) and not isimage(segmentation)
    assert not isimage("text") and not ismap(None)


def test_mean_flat_keeps_the_batch():
    assert torch.equal(mean_flat(torch.arange(8.0).reshape(2, 2, 2)), torch.tensor([1.5, 5.5]))


def test_parameters_are_counted():
    assert count_params(torch.nn.Linear(3, 2), verbose=True) == 8


def test_text_is_drawn_dark_on_white_wherever_the_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = log_txt_as_img((64, 32), ["hello", ""])
    assert drawn.shape == (2, 3, 32, 64)
    assert drawn[0].min() < 0 and drawn[1].min() == 1


@pytest.mark.parametrize("kind", ["ndarray", "list"])
def test_prefetching_keeps_the_order(kind):
    out = parallel_data_prefetch(double, np.arange(7), n_proc=3, target_data_type=kind, cpu_intensive=False)
    assert list(out) == [0, 2, 4, 6, 8, 10, 12]


def test_prefetching_nothing_is_an_error():
    with pytest.raises(ValueError, match="no data"):
        parallel_data_prefetch(double, [], n_proc=2, cpu_intensive=False)


def test_a_missing_extra_says_how_to_get_it():
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[web\]'"):
        optional("a_package_that_is_not_there", "web")


@pytest.mark.parametrize("name", [
    "models.diffusion.DiffusionEngine", "models.autoencoder.AutoencoderKLInferenceWrapper",
    "modules.GeneralConditioner", "modules.encoders.modules.FrozenOpenCLIPEmbedder2",
    "modules.diffusionmodules.denoiser.DiscreteDenoiser", "modules.diffusionmodules.denoiser_scaling.VScaling",
    "modules.diffusionmodules.denoiser_weighting.EpsWeighting",
    "modules.diffusionmodules.discretizer.LegacyDDPMDiscretization",
])  # fmt: skip
def test_the_names_of_sgm_lead_to_what_does_the_same_here(name):
    assert get_obj_from_str(f"sgm.{name}").__module__.startswith("ldm.")
