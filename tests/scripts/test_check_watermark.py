"""scripts/check_watermark.py, as a command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.image.io import write_png
from ldm.image.watermark import TEXT, stamp

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_watermark.py"


def check(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """marked.png (dwtDct), fallback.png (dwtDctSvd), other.png (another text), plain.png, tiny.png and broken.png."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = Image.fromarray(np.random.default_rng(0).normal(128, 8, (256, 256, 3)).clip(0, 255).astype(np.uint8))
    write_png(folder / "marked.png", stamp(noise).image)
    write_png(folder / "fallback.png", stamp(Image.new("RGB", (256, 256), (120, 170, 220))).image)
    write_png(folder / "other.png", stamp(noise, "SDV2").image)
    write_png(folder / "plain.png", noise)
    write_png(folder / "tiny.png", Image.new("RGB", (1, 1)))
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def test_every_picture_carries_the_mark(folder):
    run = check(folder / "marked.png", folder / "fallback.png")
    assert run.stdout == (f"{folder / 'marked.png'}\tStableDiffusionV1\tdwtDct\n"
                          f"{folder / 'fallback.png'}\tStableDiffusionV1\tdwtDctSvd\n")
    assert (run.returncode, run.stderr) == (0, "")


def test_one_picture_without_the_mark_fails_the_check_and_the_others_are_still_read(folder):
    names = ["plain.png", "absent.png", "tiny.png", "broken.png", "marked.png"]
    run = check(*(folder / name for name in names))
    assert run.returncode == 1
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    assert lines == [[str(folder / "plain.png"), "no watermark", "-"], [str(folder / "tiny.png"), "no watermark", "-"],
                     [str(folder / "marked.png"), "StableDiffusionV1", "dwtDct"]]
    errors = run.stderr.splitlines()
    assert len(errors) == 2
    assert "absent.png" in errors[0]
    assert "broken.png" in errors[1]


def test_another_text_can_be_looked_for(folder):
    assert check(folder / "marked.png", "--text", "StableDiffusionV1").returncode == 0
    assert check(folder / "other.png", "--text", "StableDiffusionV1").returncode == 1


def test_the_texts_of_all_originals_are_looked_for(folder):
    assert check(folder / "other.png").stdout.split("\t")[1:] == ["SDV2", "dwtDct\n"]


@pytest.mark.parametrize("arguments", [[], ["--text", "", "a.png"], ["--unknown", "a.png"]])
def test_wrong_usage_exits_with_2(arguments):
    run = check(*arguments)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_help_shows_the_default_and_loads_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'cv2', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("\n0 []\n")
    assert f"(default: {TEXT}" in run.stdout
