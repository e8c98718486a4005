"""Requests into batches, batches into files."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.errors import LdmError, NumericalError, OutOfMemory, OutputError
from ldm.generation.batch import Run, Summary
from ldm.generation.finish import Finisher
from ldm.generation.options import RunOptions
from ldm.generation.pipeline import Pipeline
from ldm.generation.plan import plan, settings
from ldm.generation.record import HOW, Recorder, Replay
from ldm.generation.request import Request
from ldm.generation.rows import Row
from ldm.image.io import read_image

SMALL = {"width": 32, "height": 32, "steps": 2, "sampler": "ddim", "scale": 1.0}


def prompts(batch):
    return [job.request.prompt for job in batch]


def seeds(batch):
    return [job.request.seed for job in batch]


def test_every_round_goes_through_all_the_prompts_and_its_last_batch_may_be_short():
    batches = plan([Row(Request(prompt=letter)) for letter in "abcde"], batch_size=2, n_iter=2)
    assert list(map(prompts, batches)) == [["a", "b"], ["c", "d"], ["e"]] * 2


def test_a_batch_ends_where_the_settings_change():
    requests = [Request(prompt="a"), Request(prompt="b", negative_prompt="c"), Request(steps=7), Request(seed=3)]
    assert list(map(len, plan(list(map(Row, requests)), batch_size=8, n_iter=1))) == [2, 1, 1]


def test_rows_that_are_alike_share_a_batch_where_others_lie_between_them():
    rows = [Row(Request(prompt=letter, steps=5 + index % 2)) for index, letter in enumerate("abcdef")]
    batches = list(plan(rows, batch_size=2, n_iter=1))
    assert list(map(prompts, batches)) == [["a", "c"], ["b", "d"], ["e"], ["f"]]
    assert [[job.index for job in batch] for batch in batches] == [[0, 2], [1, 3], [4], [5]]


def test_a_row_with_a_seed_of_its_own_has_it_wherever_it_stands():
    rows = [Row(Request(seed=7, seed_mode="image")), Row(Request(seed=90, seed_mode="image"), seeded=True)]
    assert list(map(seeds, plan(rows, batch_size=2, n_iter=2))) == [[7, 90], [9, 91]]


def test_in_image_mode_the_seeds_go_on_through_the_run_and_may_meet_in_one_batch():
    rows = [Row(Request(seed=7, seed_mode="image"))] * 3
    assert list(map(seeds, plan(rows, batch_size=2, n_iter=2))) == [[7, 8], [9], [10, 11], [12]]
    assert settings(Request(seed=1, seed_mode="image")) == settings(Request(seed=2, seed_mode="image"))
    assert settings(Request(seed=1)) != settings(Request(seed=2))


def test_a_run_with_failures_exits_with_1():
    assert Summary(made=3).exit_code == 0
    assert Summary(made=3, failed=1).exit_code == 1


class Damaged:
    """A pipeline that raises in place of chosen batches, and spoils chosen pictures: what a machine may do to a run."""

    def __init__(self, pipeline, failures):
        self.pipeline, self.failures, self.batch = pipeline, failures, -1

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def generate(self, batch, draw, on_step):
        self.batch += 1
        pictures = self.pipeline.generate(batch, draw, on_step)
        if error := self.failures.get(self.batch):
            raise error
        return [self.failures.get((self.batch, index), picture) for index, picture in enumerate(pictures)]


@pytest.fixture
def run(pipeline, tmp_path):
    """A run that writes into tmp_path/out: run({0: the error of a batch, (1, 0): that of a picture}, batch_size=2)."""
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    shared = pipeline("text")
    own = Pipeline(deepcopy(shared.model), shared.geometry)  # which running out of memory lays out anew

    def make(failures=None, **options):
        options = RunOptions(outdir=str(tmp_path / "out"), watermark="", safety="off", **options)
        recorder = Recorder(tmp_path / "config.yaml", tmp_path / "model.ckpt", dict.fromkeys(HOW, "auto"))
        told = []
        made = Run(Damaged(own, failures or {}), options, Finisher(options), recorder,
                   lambda event, **facts: told.append((event, facts)))
        made.told = told
        return made

    return make


def saved(run):
    return [facts["path"] for event, facts in run.told if event == "saved"]


def rows(text, **others):
    return [Row(Request(prompt=letter, **SMALL, **others)) for letter in text]


def test_each_file_is_told_as_soon_as_it_is_there(run, tmp_path):
    going = run(batch_size=2)
    assert going.draw(rows("abc")) == Summary(made=3)
    out = tmp_path / "out"
    assert saved(going) == [*(out / f"samples/0000{k}.png" for k in range(3)), out / "grid-0000.png"]
    assert all(path.exists() for path in saved(going))


def test_a_batch_that_fails_takes_no_other_with_it(run, caplog):
    going = run({1: NumericalError("it came to nothing")}, batch_size=2)
    assert going.draw(rows("abcde")) == Summary(made=3, failed=2)
    assert [path.name for path in saved(going)] == ["00000.png", "00001.png", "00004.png", "grid-0000.png"]
    assert caplog.messages == ["'c': it came to nothing"]


def test_a_picture_that_fails_takes_no_other_with_it(run, caplog):
    going = run({(0, 1): NumericalError("it came to nothing")}, batch_size=3)
    assert going.draw(rows("abc")) == Summary(made=2, failed=1)
    assert [read_image(path).size for path in saved(going)] == [(32, 32), (32, 32), (70, 36)]
    assert caplog.messages == ["'b': it came to nothing"]


def test_what_would_fail_again_ends_the_run(run, tmp_path):
    with pytest.raises(OutOfMemory):
        run({1: OutOfMemory("no room"), 2: OutOfMemory("no room")}, batch_size=1).draw(rows("abc"))
    assert len(list((tmp_path / "out/samples").iterdir())) == 1
    going = run(batch_size=1)
    tell = going.tell

    def lose_the_folder(event, **facts):
        tell(event, **facts)
        if event == "saved":
            (tmp_path / "out/samples").rename(tmp_path / "elsewhere")

    going.tell = lose_the_folder
    with pytest.raises(OutputError, match="has disappeared"):
        going.draw(rows("abc"))
    assert [event for event, _ in going.told].count("batch") in (2, 3)  # the third may have begun
    assert read_image(tmp_path / "elsewhere/00001.png").size == (32, 32)


def test_a_batch_that_is_too_large_is_drawn_in_halves_and_a_row_that_still_is_fails(run, caplog):
    full = OutOfMemory("no room")
    going = run({0: full, 2: full, 4: full, 5: full}, batch_size=4)  # 4; then 2; 2, 1, 1, and 1 with the least memory
    rows_of_a_file = [replace(row, place=f"line {n}") for n, row in enumerate(rows("abcd"), 1)]
    assert going.draw(rows_of_a_file) == Summary(made=3, failed=1)
    assert [path.name for path in saved(going)] == ["00000.png", "00001.png", "00002.png", "grid-0000.png"]
    assert caplog.messages[:3] == ["no room: it was enough for 2", "no room: it was enough for 1",
                                   "no room: trying with --memory lowest"]
    assert caplog.messages[3].startswith("line 4, 'd': no room, and --memory lowest is all that can be saved: make it")
    again = run()
    again.redraw(Replay.read(saved(going)[2]))
    assert saved(again)[0].read_bytes() == saved(going)[2].read_bytes()


def test_a_picture_that_needs_the_least_memory_says_so_in_its_record_and_is_made_again_with_it(run):
    going = run({0: OutOfMemory("no room")}, batch_size=1, skip_grid=True)  # 1, and 1 with the least memory; then 1
    assert going.draw(rows("ab")) == Summary(made=2)
    assert [Replay.read(path).how["memory"] for path in saved(going)] == ["lowest", "auto"]


def test_the_grid_shows_what_was_made_in_rows_of_the_batch_size(run):
    going = run(batch_size=2, n_iter=3)
    going.draw(rows("ab"))
    *samples, grid = (np.asarray(read_image(path)) for path in saved(going))
    assert grid.shape == (3 * 34 + 2, 2 * 34 + 2, 3)
    assert np.array_equal(grid[36:68, 36:68], samples[3])


def test_pictures_of_other_sizes_go_into_other_grids(run):
    going = run(batch_size=2)
    going.draw([*rows("ab"), Row(replace(rows("c")[0].request, width=48))])
    grids = [read_image(path).size for path in saved(going) if path.name.startswith("grid")]
    assert grids == [(70, 36), (48, 32)]


def test_files_keep_the_names_that_they_are_given_and_are_never_overwritten(run, tmp_path):
    going = run()
    first, second = (row.request for row in rows("ab"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").write_text("mine")
    assert going.draw_files({first: "a.png", second: "b.png"}).failed == 0
    assert saved(going) == [out / "a.png"]
    assert (out / "b.png").read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "manifest.jsonl"]


@pytest.mark.parametrize("settings", [{}, {"fixed_code": True}, {"seed_mode": "image"}, {"sampler": "euler_a"}])
def test_the_record_of_any_picture_of_a_run_makes_it_again(run, settings):
    going = run(batch_size=2, n_iter=2, skip_grid=True)
    going.draw([Row(replace(row.request, **settings)) for row in rows("abc")])
    for path in saved(going)[1], saved(going)[2], saved(going)[5]:
        again = run()
        again.redraw(Replay.read(path))
        assert saved(again)[0].read_bytes() == path.read_bytes()


def test_a_batch_that_failed_does_not_shift_the_noise_that_is_recorded(run):
    going = run({0: LdmError("cut short")}, batch_size=1, skip_grid=True)
    going.draw(rows("ab"))
    again = run()
    again.redraw(Replay.read(saved(going)[0]))
    assert saved(again)[0].read_bytes() == saved(going)[0].read_bytes()


def test_the_metadata_are_written_into_every_sample_and_no_grid(run):
    going = run(batch_size=2)
    going.draw(rows("ab"))
    *samples, grid = saved(going)
    for path, prompt in zip(samples, "ab", strict=True):
        with Image.open(path) as image:
            assert json.loads(image.info["ldm"])["request"]["prompt"] == prompt
            assert image.info["parameters"].startswith(prompt)
    with Image.open(grid) as image:
        assert "ldm" not in image.info
