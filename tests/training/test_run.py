"""Runs of main.py as users start, interrupt and resume them."""

import csv
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy

import main
from ldm.checkpoint import open_checkpoint, read_checkpoint
from ldm.errors import ConfigError
from ldm.models.load import load_model
from ldm.training.run import check_strategy, new_trainer
from ldm.util import instantiate_from_config


def alarm(step: int, signum: int | None) -> list[str]:
    """Overrides that make a run interrupt itself in the step after so many."""
    number = "null" if signum is None else int(signum)
    return ["lightning.callbacks.alarm.target=alarm.Alarm", f"lightning.callbacks.alarm.params.step={step}",
            f"lightning.callbacks.alarm.params.signum={number}"]


def curve(logs: Path) -> dict[int, float]:
    """The training loss by step, from every CSV that a log folder holds."""
    tables = (file.read_text().splitlines() for file in sorted(logs.glob("csv/*/metrics.csv")))
    rows = [row for table in tables for row in csv.DictReader(table)]
    return {int(row["step"]): float(row["train/loss_step"]) for row in rows if row.get("train/loss_step")}


def weights(logs):
    return torch.load(logs / "checkpoints" / "last.ckpt", weights_only=False)


# An epoch has six batches: the signal is heard at the end of one, the error breaks off a step in the middle of another.
@pytest.mark.parametrize("step, signum, code", [(5, signal.SIGTERM, 143), (7, None, 1)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(runs, whole, step, signum, code):
    logs = runs.train(f"interrupted-{step}", *alarm(step, signum), code=code)
    code, output = runs.run("-r", logs, "-t", "--no-test", "lightning.callbacks.alarm=null")
    assert code == 0, output

    assert curve(logs) == curve(whole)  # which also says that the run kept its options
    resumed, straight = weights(logs), weights(whole)
    assert resumed["global_step"] == straight["global_step"] == 9
    for key, weight in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], weight), key


def test_a_run_leaves_its_configs_curves_and_checkpoints(whole):
    assert {path.name for path in whole.iterdir()} >= {"checkpoints", "configs", "csv", "tensorboard"}
    assert len(list((whole / "configs").glob("*-project.yaml"))) == 1
    assert sorted(curve(whole)) == list(range(9))


def test_the_warm_up_and_the_scaled_learning_rate_reach_the_optimizer(whole):
    (group,) = weights(whole)["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == pytest.approx(2 * 1e-4)  # the batch size times base_learning_rate
    assert weights(whole)["lr_schedulers"][0]["last_epoch"] == 9


def test_the_loader_of_the_scripts_reads_what_training_wrote(whole, monkeypatch):
    path = whole / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(whole.parent)
    (config,) = (whole / "configs").glob("*-project.yaml")
    model = load_model(config, path)
    assert open_checkpoint(path).has_ema
    averaged = read_checkpoint(path, use_ema=True)["model.diffusion_model.out.2.weight"]
    assert torch.equal(model.model.diffusion_model.out[2].weight, averaged)
    assert model.scale_factor != 1.0


@pytest.mark.parametrize("words, code, clue", [
    (["-t"], 2, "name a config"),
    (["-b", "absent.yaml", "-t"], 3, "no config at absent.yaml"),
    (["-b", "tiny.yaml", "-t", "--max_stepz", "3"], 2, "unknown argument '--max_stepz'"),
    (["-b", "tiny.yaml", "-t", "--auto_lr_find"], 3, "set model.base_learning_rate"),
    (["-b", "tiny.yaml", "-t", "model.target=ldm.nowhere.Model"], 3, "there is no module ldm.nowhere"),
    (["-b", "tiny.yaml", "-t", "data.params.batch_size=${absent}"], 3, "refers to what is not in it"),
    (["-r", "nowhere", "-t"], 2, "nothing to resume at nowhere"),
    (["-r", ".", "-n", "x"], 2, "give one of them"),
])
def test_a_command_that_cannot_be_carried_out_says_so_in_one_line(runs, monkeypatch, caplog, words, code, clue):
    monkeypatch.chdir(runs.folder)
    assert main.main(words) == code
    (line,) = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert clue in line


@pytest.mark.parametrize("options, clue", [
    ({"accelerator": "cpu", "strategy": "fsdp"}, "requires a GPU"),
    ({"precision": "bf17"}, "bf17"),
])
def test_trainer_options_that_lightning_refuses_are_told_in_one_line(options, clue):
    with pytest.raises(ConfigError, match=clue) as caught:
        new_trainer(options)
    assert "\n" not in str(caught.value)


def test_sharded_weights_are_trained_without_an_average():
    check_strategy(FSDPStrategy(), SimpleNamespace(use_ema=False))
    with pytest.raises(ConfigError, match="use_ema=false"):
        check_strategy(FSDPStrategy(), SimpleNamespace(use_ema=True))


def test_a_switch_before_a_change_to_the_config_does_not_take_it_for_its_value():
    with pytest.raises(SystemExit):
        main.make_parser().parse_args(["--no-test", "perhaps"])
    assert main.main(["--no-test", "model.x=1"]) == 2  # for want of a config alone


def test_help_loads_nothing_heavy():
    code = ("import sys, main; main.make_parser().format_help(); "
            "print(*{'torch', 'numpy', 'omegaconf', 'pytorch_lightning'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(main.__file__).parent, text=True, capture_output=True)
    assert done.stdout.strip() == ""
    assert done.returncode == 0


def test_what_public_code_imports_from_main_is_there():
    for name in ("DataModuleFromConfig", "ImageLogger", "SetupCallback", "CUDACallback", "WrappedDataset"):
        assert getattr(main, name).__name__ == name
    assert main.instantiate_from_config is instantiate_from_config


def test_a_checkpoint_that_asks_to_run_code_is_not_resumed(runs, whole):
    folder = runs.folder / "hostile" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({**weights(whole), "extra": Path("/")}, folder / "last.ckpt")  # any object will do
    code, output = runs.run("-r", folder.parent, "-b", runs.config, "-t", "--no-test")
    assert code == 3, output
    assert "asks to run code" in output
    assert "Traceback" not in output
