"""manifest.jsonl: what is written and read back, by any number of runs at once."""

import multiprocessing
from dataclasses import asdict

import pytest

from ldm.errors import OutputError
from ldm.generation.ledger import Entry, Ledger


def entry(index: int, settings: str = "s", **facts) -> Entry:
    return Entry(index, f"row {index}", settings, 42, [index], [], [[1, 4, 8, 8, 1]], **facts)


def test_what_is_written_is_read_back(tmp_path):
    ledger = Ledger(tmp_path)
    past = ledger.begin(3, above=6, above_grid=-1)
    assert (past.first, past.first_grid, past.end) == (7, 0, 10)
    ledger.append(run=past.run, **asdict(entry(1, file="00008.png", sha256="f")))
    ledger.append(run=past.run, **asdict(entry(2, error="too large")))
    again = Ledger(tmp_path).read()[past.run]
    assert again.entries == {1: entry(1, file="00008.png", sha256="f"), 2: entry(2, error="too large")}
    ledger.append(run=past.run, ended=True)
    assert Ledger(tmp_path).read()[past.run].end == 0


def test_a_run_takes_no_numbers_of_one_that_has_not_ended(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.begin(10, above=-1, above_grid=-1)
    second = ledger.begin(5, above=2, above_grid=-1)
    assert (first.first, second.first) == (0, 10)
    assert (first.first_grid, second.first_grid) == (0, 1)
    for past in (first, second):
        ledger.append(run=past.run, ended=True)
    assert ledger.begin(5, above=2, above_grid=0).first == 3


def begin_in(folder) -> int:
    return Ledger(folder).begin(10, above=-1, above_grid=-1).first


def test_runs_that_begin_at_once_take_numbers_of_their_own(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert sorted(pool.map(begin_in, [tmp_path] * 8)) == list(range(0, 80, 10))


def test_a_torn_line_costs_itself_alone(tmp_path):
    ledger = Ledger(tmp_path)
    past = ledger.begin(3, above=-1, above_grid=-1)
    with open(ledger.path, "a") as file:
        file.write('{"run": "' + past.run + '", "index": 0, "ro')
    ledger.append(run=past.run, **asdict(entry(1)))
    with open(ledger.path, "a") as file:
        file.write('not json\n["a list"]\n{"run": "unknown", "index": 0}\n')
    assert set(Ledger(tmp_path).read()[past.run].entries) == {1}


def test_the_run_to_go_on_with_is_the_latest_with_the_most_pictures_of_these_settings(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.find(["a", "b"]) is None
    one, two, other = (ledger.begin(2, -1, -1) for _ in range(3))
    for past, settings in ((one, "ab"), (two, "ax"), (other, "yz")):
        for index, letter in enumerate(settings):
            ledger.append(run=past.run, **asdict(entry(index, letter)))
    assert ledger.find(["a", "b"]).run == one.run
    assert ledger.find(["a", "q"]).run == two.run
    assert ledger.find(["q", "q"]) is None
    begun = ledger.begin(2, -1, -1)
    assert ledger.find(["q", "q"]).run == begun.run
    assert ledger.find(["q", "q", "q"]) is None


def test_a_manifest_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"cannot (read|write) .*manifest.jsonl: Is a directory"):
        Ledger(tmp_path).begin(1, -1, -1)
