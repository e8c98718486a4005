"""Rows that come through a pipe while others are drawn."""

import os
from argparse import Namespace
from contextlib import suppress

import pytest

from ldm.errors import RequestError
from ldm.generation import arguments
from ldm.generation.arrivals import Arrivals
from ldm.generation.plan import plan, rounds
from ldm.generation.request import Request
from ldm.generation.rows import Row, row_parser


def add_request(parser: arguments.Parser) -> None:
    arguments.add_prompts(parser, "")
    arguments.add_sampling(parser, sampler="plms", scale=7.5)


@pytest.fixture
def pipe():
    """(where to write, the rows that come of it)"""
    reader, writer = os.pipe()
    command_line = arguments.Parser(None)
    add_request(command_line)
    parse = row_parser(add_request, command_line.parse_args([], Namespace(outdir="x")))
    yield writer, Arrivals(reader, parse, most=3)
    with suppress(OSError):
        os.close(writer)


def test_a_row_is_there_before_the_next_one_is_written(pipe):
    writer, arrivals = pipe
    found = iter(arrivals)
    assert next(found) == []
    for prompt in ("a fox", "ein Mädchen"):
        os.write(writer, f"{prompt} --seed 7\n".encode())
        row, = next(found)
        assert (row.request.prompt, row.request.seed, row.seeded) == (prompt, 7, True)
        assert next(found) == []
    os.write(writer, b"cut off")
    os.close(writer)
    last, = next(found)
    assert (last.request.prompt, last.place) == ("cut off", "standard input, line 3")
    assert list(found) in ([], [[]])


def test_rows_that_wait_come_together_as_many_as_are_wanted(pipe):
    writer, arrivals = pipe
    os.write(writer, b"\xef\xbb\xbfa\n\n  \nb\r\n{c,d}\n" + b"e\n" * 3)
    os.close(writer)
    found = [rows for rows in arrivals if rows]
    assert [row.request.prompt for rows in found for row in rows] == [*"abcd", *"eee"]
    assert [row.place[-1] for rows in found for row in rows] == [*"1455678"]
    assert max(map(len, found)) <= 3


def test_a_line_that_does_not_parse_is_a_row_that_says_why(pipe):
    writer, arrivals = pipe
    os.write(writer, b"fine\na fox --ar 16:9\nM\xe4dchen\nb --scale 'x\nfine\n")
    os.close(writer)
    rows = [row for rows in arrivals for row in rows]
    assert [row.error for row in rows] == ["", "unrecognized arguments: --ar 16:9", "it is not UTF-8",
                                           "No closing quotation", ""]
    assert (rows[1].request.prompt, rows[1].place) == ("a fox --ar 16:9", "standard input, line 2")


def test_a_pipe_without_a_row_and_one_that_cannot_be_read_say_so(pipe, tmp_path):
    writer, arrivals = pipe
    os.write(writer, b"\n  \n")
    os.close(writer)
    with pytest.raises(RequestError, match="standard input has no prompts in it"):
        list(arrivals)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(RequestError, match="cannot read standard input: Is a directory"):
        list(Arrivals(folder, lambda options: Row(Request()), 3))
    os.close(folder)


def test_the_number_of_a_picture_does_not_depend_on_how_rows_arrive():
    image = Request(seed_mode="image", seed=5)
    rows = [Row(image), Row(Request(seed_mode="image", seed=90), seeded=True), Row(image)]

    def jobs(*groups):
        first = 0
        for group in groups:
            several = rounds(group, 2)
            yield from (job for batch in plan(several, 4, 1, first) for job in batch)
            first += len(several)

    one, other = list(jobs(rows)), list(jobs(rows[:1], rows[1:]))
    assert sorted(one, key=lambda job: job.index) == other
    assert [job.request.seed for job in other] == [5, 6, 90, 91, 9, 10]
