"""scripts/doctor.py, as a command, on installations that work and on broken ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.doctor import Finding, checkpoints, lines, pins, ready, satisfies, split, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code, with no models in it, as a user's working folder."""
    folder = tmp_path / "checkout"
    for name in ("ldm", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "constraints.txt", folder)
    return folder


@pytest.fixture
def doctor(checkout):
    """Run the copy's doctor: doctor(options, flags of the interpreter, packages that stand before the installed)."""

    def run(*options: str, flags=(), **broken: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(checkout / "home")}
        environment["PYTHONPATH"] = str(checkout / "broken")
        for package, code in broken.items():
            (checkout / "broken" / package).mkdir(parents=True)
            (checkout / "broken" / package / "__init__.py").write_text(code)
        line = [sys.executable, *flags, checkout / "scripts" / "doctor.py", *options]
        return subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)

    return run


def told(run: subprocess.CompletedProcess) -> list[dict]:
    """The findings, of a run with --json that did not fall over."""
    assert run.stderr == ""
    content = json.loads(run.stdout)
    assert content["ready"] == (run.returncode == 0)
    return content["findings"]


def of(findings: list[dict], area: str) -> list[dict]:
    return [finding for finding in findings if finding["area"] == area]


def test_with_a_checkpoint_a_picture_can_be_made(doctor, checkout, models):
    place = checkout / "models" / "ldm" / "stable-diffusion-v1"
    shutil.copytree(models["text"].parent, place)
    (place / "twin.ckpt").symlink_to("model.ckpt")
    (place / "damaged.ckpt").write_text("<!doctype html>")
    run = doctor("--json")
    assert run.returncode == 0, run.stdout
    findings = told(run)
    good, bad = of(findings, "checkpoint")
    assert (good["state"], bad["state"]) == ("ok", "note")
    assert "model.ckpt" in good["text"]
    assert "is a web page" in bad["text"]
    assert of(findings, "torch")[0]["state"] == "ok"
    assert "--precision auto is" in of(findings, "device")[0]["text"]
    assert of(findings, "import")[0]["state"] == "ok"
    assert of(findings, "cache")[0]["text"].startswith(str(checkout / "home" / "hub"))


def test_without_one_it_says_what_to_fetch(doctor):
    run = doctor()
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "no picture can be made yet: see what is missing above"
    missing = [line for line in run.stdout.splitlines() if line.startswith("missing")]
    assert len(missing) == 1
    assert "no weights that can be run under models/" in missing[0]
    assert "python scripts/fetch_model.py v1.5" in run.stdout


@pytest.mark.parametrize(("torch", "said"), [
    ("raise ImportError('libtorch_cpu.so: cannot open shared object file')", "ImportError: libtorch_cpu.so"),
    ("raise ModuleNotFoundError(\"No module named 'torch._C'\")", "No module named 'torch._C'"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ("import os; os._exit(3)", "it ended without a word"),
    ("", "cannot import name"),
])
def test_a_pytorch_that_is_broken_in_any_way_is_a_finding(torch, said, doctor):
    run = doctor("--json", torch=torch)
    assert run.returncode == 1
    found = of(told(run), "torch")
    assert found[0]["state"] == "missing"
    assert said in found[0]["text"]
    assert "pip install" in found[0]["mend"]


def test_a_package_that_does_not_load_is_told_apart_from_pytorch(doctor):
    run = doctor("--json", imwatermark="raise ImportError('libGL.so.1: cannot open shared object file')")
    assert run.returncode == 1
    findings = told(run)
    assert of(findings, "torch")[0]["state"] == "ok"
    (found,) = of(findings, "import")
    assert (found["state"], found["mend"]) == ("missing", "pip install -c constraints.txt -e .")
    assert "libGL.so.1" in found["text"]


def test_a_torchvision_of_another_build_than_torch_is_told_with_the_way_out(doctor):
    run = doctor("--json", torchvision="raise RuntimeError('operator torchvision::nms does not exist')")
    (found,) = (one for one in of(told(run), "import") if "torchvision" in one["text"])
    assert found["state"] == "note"
    assert found["text"].endswith("operator torchvision::nms does not exist")
    assert "pip uninstall torchvision" in found["mend"]


def test_it_runs_where_nothing_is_installed(doctor):
    run = doctor("--json", flags=("-I", "-S"))
    assert run.returncode == 1
    (found,) = of(told(run), "package")
    assert found["text"] == "ldm itself is not installed"
    assert found["mend"] == "pip install -c constraints.txt -e ."


def test_versions_are_held_against_the_constraints(doctor, checkout):
    (checkout / "constraints.txt").write_text("numpy==1.0.0\nPillow==999\n")
    found = of(told(doctor("--json")), "package")
    differ = {finding["text"].split()[0]: finding for finding in found if "the tests pass on" in finding["text"]}
    assert set(differ) == {"numpy", "pillow"}
    assert all(finding["state"] == "note" for finding in differ.values())
    assert differ["numpy"]["text"].endswith("the tests pass on 1.0.0")


def test_wrong_usage_exits_with_2(doctor):
    assert doctor("--unknown").returncode == 2


# ------------------------------------------------------------------------------------------------------------ the parts

def test_requirements_are_taken_apart():
    assert split("torch>=2.13") == ("torch", ">=2.13", "")
    assert split("pytorch-lightning!=2.6.2,>=2.6; extra == 'train'") == ("pytorch-lightning", "!=2.6.2,>=2.6", "train")


def test_versions_of_a_build_are_those_of_the_release():
    assert satisfies("2.13.0+cpu", "==2.13.0")
    assert not satisfies("2.12.1", ">=2.13")


def test_the_pins_are_those_of_the_constraints():
    assert pins()["invisible-watermark"]
    assert pins()["torch"]


def test_the_model_that_ships_with_the_project_is_enough_and_what_it_lacks_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in ("ldm.doctor", "ldm.generation.options"):
        monkeypatch.setattr(f"{module}.REPOSITORY", tmp_path / "checkout")
    folder = tmp_path / "checkout/models/ldm/shapes"
    (folder / "clip").mkdir(parents=True)
    for name in ("model.safetensors", "clip/model.safetensors", "clip/config.json"):
        (folder / name).touch()
    shipped = str(folder / "model.safetensors")
    assert list(map(str, weights())) == [shipped]
    found = list(checkpoints({"checkpoints": {shipped: {"family": "unknown", "config": "config.yaml"}}}))
    assert [finding.state for finding in found] == ["ok", "note"]
    assert "coloured shapes" in found[1].text
    assert "fetch_model.py" in found[1].mend


def test_only_what_a_picture_needs_keeps_it_from_being_made():
    findings = [Finding("a", "fine"), Finding("b", "worth knowing", "note", "do this")]
    assert ready(findings)
    assert list(lines(findings))[-1] == "a picture can be made"
    assert not ready([*findings, Finding("c", "gone", "missing", "do that")])
