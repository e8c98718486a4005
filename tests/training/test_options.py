"""Trainer options, old and new, from YAML and from the command line."""

import pytest

from ldm.errors import ConfigError, RequestError
from ldm.training.options import read_overrides, trainer_options


def test_words_that_main_does_not_know_are_changes_to_the_config_or_trainer_options():
    words = ["model.params.ckpt_path=a=b.ckpt", "--gpus", "0,", "--max_steps=7", "--fast_dev_run", "--devices", "2"]
    dotlist, flags = read_overrides(words)
    assert dotlist == ["model.params.ckpt_path=a=b.ckpt"]
    assert flags == {"gpus": "0,", "max_steps": 7, "fast_dev_run": True, "devices": 2}


@pytest.mark.parametrize("word", ["--stride", "-x", "speak"])
def test_a_word_that_is_neither_is_refused_by_name(word):
    with pytest.raises(RequestError, match=word):
        read_overrides([word])


@pytest.mark.parametrize("gpus, accelerator, devices", [
    ("0,", "gpu", [0]), ("0,1", "gpu", [0, 1]), ("2", "gpu", 2), (4, "gpu", 4), (-1, "gpu", -1),
    ([1, 3], "gpu", [1, 3]), (0, "cpu", 1), (None, "cpu", 1),
])
def test_gpus_of_lightning_1_becomes_an_accelerator_and_devices(gpus, accelerator, devices):
    assert trainer_options({"gpus": gpus}) == {"accelerator": accelerator, "devices": devices}


def test_accelerator_ddp_of_lightning_1_becomes_a_strategy():
    assert trainer_options({"accelerator": "ddp", "gpus": "0,1"}) == {
        "strategy": "ddp", "accelerator": "gpu", "devices": [0, 1]}  # fmt: skip


def test_other_options_of_lightning_1_get_their_new_names():
    old = {"checkpoint_callback": True, "progress_bar_refresh_rate": 0, "replace_sampler_ddp": False, "max_epochs": 3}
    assert trainer_options(old) == {"enable_checkpointing": True, "enable_progress_bar": False,
                                    "use_distributed_sampler": False, "max_epochs": 3}


def test_an_option_without_effect_is_left_out_and_said_so(caplog):
    assert trainer_options({"amp_level": "O2"}) == {}
    assert "amp_level" in caplog.text


@pytest.mark.parametrize("name, clue", [("track_grad_norm", "log it"), ("max_stepz", "no option 'max_stepz'")])
def test_an_option_that_is_gone_or_unknown_is_an_error_that_names_it(name, clue):
    with pytest.raises(ConfigError, match=clue):
        trainer_options({name: 1})
