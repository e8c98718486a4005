"""Runs that ended early and go on: killed, altered, failed."""

import json
import random
from dataclasses import replace
from pathlib import Path

import killing
import pytest
from PIL import Image

from ldm.generation.batch import Run
from ldm.generation.ledger import file_hash
from ldm.generation.noise import NoiseSource
from ldm.generation.request import Request
from ldm.generation.rows import Row


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Run:
    return killing.open_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def draw(opened, tmp_path, monkeypatch):
    """Draw the rows into tmp_path, and give what came of it and the paths of the files that were written."""
    usual = opened.options
    monkeypatch.setattr(opened, "options", usual)  # as they are for the next test

    def run(rows=killing.ROWS, **options):
        opened.options = replace(usual, outdir=str(tmp_path), **options)
        opened.noise = NoiseSource(opened.pipeline.model.device)
        told = []
        opened.tell = lambda event, **facts: told.append(facts["path"]) if event == "saved" else None
        return opened.draw(rows), told

    return run


def manifest(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not hasattr(killing.os, "fork"), reason="forks the processes that it kills")
def test_a_run_that_is_killed_at_any_moment_and_resumed_leaves_the_files_of_one_that_was_not(opened, tmp_path):
    folders, different = killing.kill_and_resume(opened, tmp_path, 5, random.Random(1))
    assert (folders > 0, different) == (True, 0)


def test_only_what_is_missing_or_altered_is_made_again_under_the_same_names(draw, tmp_path):
    assert draw()[0].made == 22
    before = killing.files(tmp_path)
    (tmp_path / "samples/00004.png").unlink()
    (tmp_path / "samples/00011.png").write_bytes(b"altered")
    summary, written = draw(go_on=True)
    assert summary.made == 2
    assert [path.name for path in written if path.parent.name == "samples"] == ["00004.png", "00011.png"]
    assert killing.files(tmp_path) == before


def test_a_row_whose_settings_have_changed_is_made_again_and_the_others_stay(draw, tmp_path):
    draw()
    before = killing.files(tmp_path)
    rows = list(killing.ROWS)
    rows[3] = replace(rows[3], request=replace(rows[3].request, prompt="a hare"))
    summary, _ = draw(rows, go_on=True)
    after = killing.files(tmp_path)
    assert summary.made == 2  # in each round
    assert {name for name in before if before[name] != after[name] and "grid" not in name} == {
        "samples/00003.png", "samples/00014.png"}


def test_a_row_whose_picture_or_mask_has_changed_is_made_again(draw, opened, tmp_path):
    def paint(name, colour):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)

    pictures = [str(tmp_path / name) for name in ("a.png", "b.png", "mask.png")]
    for path in pictures:
        paint(path, "white")
    mine, others, mask = pictures
    start = replace(killing.SMALL, sampler="ddim", strength=0.5)
    rows = [Row(replace(start, init_img=mine)), Row(replace(start, init_img=others)),
            Row(replace(start, init_img=others, mask=mask))]
    assert draw(rows, n_iter=1, skip_grid=True)[0].made == 3
    for changed, made in ((mine, ["00000.png"]), (mask, ["00002.png"]), (others, ["00001.png", "00002.png"])):
        paint(changed, "red")
        _, written = draw(rows, n_iter=1, skip_grid=True, go_on=True)
        assert sorted(path.name for path in written) == made


def test_a_resume_with_nothing_to_go_on_with_is_a_new_run(draw, tmp_path, caplog):
    summary, _ = draw(go_on=True)
    assert summary.made == 22
    assert "has no run of these rows to go on with" in caplog.text


def test_another_run_in_the_folder_is_left_as_it_is_by_a_resume(draw, tmp_path):
    draw()
    others = [replace(row, request=replace(row.request, prompt="another")) for row in killing.ROWS]
    draw(others, go_on=True)
    before = killing.files(tmp_path)
    assert len([name for name in before if "samples" in name]) == 44
    (tmp_path / "samples/00002.png").unlink()
    assert draw(go_on=True)[0].made == 1
    assert killing.files(tmp_path) == before


def test_the_manifest_says_of_each_picture_what_became_of_it(draw, tmp_path):
    draw(killing.ROWS[:2], n_iter=1)
    began, *pictures, grid_1, grid_2, ended = manifest(tmp_path)
    assert began["pictures"] == 2
    first = pictures[0]
    assert (first["index"], first["row"], first["seed"], first["file"]) == (0, "row 0", 0, "00000.png")
    assert first["sha256"] == file_hash(tmp_path / "samples/00000.png")
    assert (first["error"], first["watermark"], first["safety"], first["cut"]) == (None, None, "", "")
    assert [grid_1["file"], grid_2["file"]] == ["grid-0000.png", "grid-0001.png"]  # the rows have two sizes
    assert ended["ended"] is True


def test_a_row_that_fails_is_recorded_and_the_rest_goes_on(draw, tmp_path, caplog):
    rows = [*killing.ROWS[:3]]
    rows[1] = replace(rows[1], request=replace(rows[1].request, scale=1e38))
    summary, written = draw(rows, n_iter=1, skip_grid=True)
    assert (summary.made, summary.failed, summary.exit_code) == (2, 1, 1)
    assert [path.name for path in written] == ["00000.png", "00002.png"]
    failed, = (line for line in manifest(tmp_path) if line.get("error"))
    assert failed["row"] == "row 1"
    assert "not finite" in failed["error"]
    assert "row 1, " in caplog.text
    rows[1] = killing.ROWS[1]
    summary, written = draw(rows, n_iter=1, skip_grid=True, go_on=True)
    assert (summary.made, [path.name for path in written]) == (1, ["00001.png"])


def test_of_rows_that_come_one_that_cannot_be_drawn_is_recorded_and_told_with_its_line(opened, draw, tmp_path, caplog):
    rows = [Row(killing.SMALL, "line 1"), Row(replace(killing.SMALL, init_img=str(tmp_path / "none.png")), "line 2"),
            *(Row(Request(prompt="a --ar 1"), f"line {n}", error="no option --ar") for n in (3, 4)),
            Row(replace(killing.SMALL, seed=7), "line 5")]
    opened.options = replace(opened.options, outdir=str(tmp_path), n_iter=1)
    told = []
    opened.tell = lambda event, **facts: told.append((event, facts))
    summary = opened.follow([[], rows[:4], [], rows[4:]])
    assert (summary.made, summary.failed) == (2, 3)
    assert [facts["path"].name for event, facts in told if facts.get("kind") == "picture"] == ["00000.png", "00004.png"]
    assert [facts["row"] for event, facts in told if event == "failed"] == ["line 2", "line 3", "line 4"]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message.partition(",")[0] for message in errors] == ["line 2", "line 3", "line 4"]
    assert [(line["row"], line["error"]) for line in manifest(tmp_path) if line.get("error")] == [
        ("line 2", f"there is no picture at {tmp_path / 'none.png'}"),
        ("line 3", "no option --ar"), ("line 4", "no option --ar")]


def test_a_run_ends_at_the_first_error_where_that_is_asked_for(draw, tmp_path):
    rows = [replace(row, request=replace(row.request, scale=1e38)) if n == 0 else row
            for n, row in enumerate(killing.ROWS)]
    summary, _ = draw(rows, n_iter=1, stop_on_error=True)
    assert summary.failed == 1
    assert summary.made < 10
