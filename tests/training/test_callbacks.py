"""An autoencoder with a discriminator under main.py, and what the callbacks leave in its log folder."""

import signal

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": 8, "size": 32}}


@pytest.fixture(scope="module")
def logs(runs):
    config = {
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 2,
                "ddconfig": {"z_channels": 2, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
                             "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "norm_channels": 8},
                "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator",
                               "params": {"disc_start": 1, "perceptual_weight": 0, "disc_num_layers": 1}},
            },
        },
        "data": {"target": "main.DataModuleFromConfig",
                 "params": {"batch_size": 2, "num_workers": 1, "train": SHAPES, "validation": SHAPES}},
        "lightning": {
            "trainer": {"gpus": 0, "accumulate_grad_batches": 2, "max_epochs": 1, "limit_val_batches": 1,
                        "enable_progress_bar": False, "enable_model_summary": False},
            "callbacks": {"image_logger": {"params": {"batch_frequency": 4, "max_images": 2, "log_first_step": True}},
                          "channels_last": {"target": "main.ChannelsLast"},
                          "alarm": {"target": "alarm.Alarm", "params": {"step": 0, "signum": int(signal.SIGUSR1)}}},
        },
    }  # fmt: skip
    path = runs.folder / "autoencoder.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    return runs.train("autoencoder", "-b", path)


def test_a_signal_that_asks_for_a_checkpoint_does_not_end_the_run(logs):
    assert (logs / "checkpoints" / "last.ckpt").exists()  # of the whole run: `train` has seen it end well


def test_two_optimizers_accumulate_batches_and_take_a_step_each(logs):
    state = torch.load(logs / "checkpoints" / "last.ckpt", weights_only=False)
    assert state["global_step"] == 4  # four batches are two updates of each optimizer
    assert [group["lr"] for optimizer in state["optimizer_states"] for group in optimizer["param_groups"]] == [
        pytest.approx(4e-4)] * 2  # fmt: skip


def test_pictures_are_logged_as_grids_of_the_size_that_was_asked_for(logs):
    for split in ("train", "val"):
        files = sorted((logs / "images" / split).glob("*.png"))
        assert {file.name.split("_")[0] for file in files} == {"inputs", "reconstructions", "samples"}
        for file in files:
            with Image.open(file) as picture:
                assert picture.size == (2 * 32 + 3 * 2, 32 + 2 * 2)


def test_the_configs_of_a_run_are_written_down(logs):
    (project,), (lightning,) = (list((logs / "configs").glob(f"*-{name}.yaml")) for name in ("project", "lightning"))
    assert "lightning" not in OmegaConf.load(project)
    assert OmegaConf.load(lightning).lightning.trainer.gpus == 0
