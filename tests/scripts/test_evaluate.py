"""scripts/evaluate.py on the tiny text model, from the command line to its tables."""

import csv
import json
from pathlib import Path

import pytest
from tiny import write_clip

SMALL = ("--n", 2, "--n_reference", 3, "--samplers", "ddim:2", "--device", "cpu", "--precision", "full", "-q")


@pytest.fixture
def evaluate(script, models, tmp_path):
    clip = write_clip(tmp_path / "clip")
    return lambda *options: script("evaluate", "--ckpt", models["text"], "--clip", clip, *SMALL, *options)


def drawn() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("outputs").rglob("samples/*.png")}


def test_the_curve_is_written_and_the_same_command_draws_only_what_is_missing(evaluate):
    run = evaluate("--scales", 1.5, 4)
    assert (run.code, run.err) == (0, [])
    assert run.out[-3:] == [f"outputs/evaluation/curve.{suffix}" for suffix in ("csv", "json", "png")]
    with open("outputs/evaluation/curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scale"] for row in rows] == ["1.5", "4.0"]
    found = json.loads(Path("outputs/evaluation/curve.json").read_text())
    assert {"checkpoint", "sha256", "run", "versions", "captions", "reference", "clip_score"} <= found.keys()
    assert found["run"]["watermark"] == ""
    before = drawn()
    assert len(before) == 4
    first = next(iter(before))
    Path(first).unlink()
    again = evaluate("--scales", 1.5, 4, "--reference", "outputs/evaluation/reference-clip.npz")
    assert again.out == run.out, again.err
    assert {path for path, when in drawn().items() if when != before[path]} == {first}


def test_the_measures_of_the_shapes_world_are_taken_together(evaluate):
    run = evaluate("--exact", "--autoencoder", "--img2img", "--inpaint")
    assert (run.code, run.err) == (0, [])
    tables = {path.stem: json.loads(path.read_text()) for path in Path("outputs/evaluation").glob("*.json")}
    assert set(tables) == {"exact", "autoencoder", "img2img", "inpaint"}
    assert tables["inpaint"]["rows"][0]["unchanged"] == 100.0
    assert {row["n"] for row in tables["exact"]["rows"][:3]} == {2}


def test_what_is_missing_is_told_in_one_line(script, models, evaluate):
    for outcome, code, words in (
        (script("evaluate", "--ckpt", models["text"], *SMALL), 3, "--clip FOLDER"),
        (evaluate("--captions", "captions.txt"), 2, "--reference"),
        (evaluate("--features", "inception"), 2, "--inception FILE"),
        (evaluate("--samplers", "plms"), 2, "plms:50"),
    ):
        assert outcome.code == code, outcome
        assert words in outcome.said
