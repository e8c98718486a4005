"""Many requests from one file: a prompt a line with options of its own, JSON lines, or CSV. Standard library only."""

import csv
import io
import json
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NoReturn

from ldm.errors import RequestError
from ldm.generation import settings
from ldm.generation.arguments import Parser, pick
from ldm.generation.axes import Axis
from ldm.generation.request import Request, read_text
from ldm.prompt.braces import expand_braces

# What begins the options behind a prompt: ` --seed 7`.
OPTIONS = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class Row:
    """A request, where it was read, for messages ("" for the command line), and whether its seed is given there.

    error: why it cannot be drawn; the request has no more than the text of the line then.
    """

    request: Request
    place: str = ""
    seeded: bool = False
    error: str = ""


# The options of one row, as they would stand on the command line -> the row.
Parse = Callable[[Sequence[str]], Row]
# A line of text, JSON or CSV -> those options.
Line = str | bytes | Mapping
Split = Callable[[Line], Sequence[str]]


class RowParser(Parser):
    """The same options as on the command line; a mistake is an error like any other, not the end of the program."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def spread(row: Row, axes: Sequence[Axis], add_options: Callable[[Parser], None]) -> list[Row]:
    """The cells of a grid that differ from a row in the options of its axes, row by row, all from the same noise.

    Raises RequestError for an axis that is no option of a row.
    """
    parser = RowParser(None, add_help=False)
    add_options(parser)
    names = settings.options_of(parser)
    for axis in axes:
        if axis.name.lower() not in names:
            raise RequestError(f"--xy: there is no option {axis.name!r} that a row may have; the nearest is "
                               f"{settings.nearest(axis.name, names)!r}")

    def cell(values: Sequence[str]) -> Row:
        given = {axis.name: value for axis, value in zip(axes, reversed(values))}
        try:
            options = [word for name, value in given.items() for word in options_of({name: meant(name, value)})]
            request = pick(Request, parser.parse_args(options, Namespace(**asdict(row.request))))
            return Row(replace(request, seed_mode="image"), row.place, seeded=True)
        except RequestError as error:
            told = " ".join(f"{name}={value}" for name, value in given.items())
            return replace(row, error=f"--xy, {told}: {error}")

    return [row] if row.error else list(map(cell, product(*(axis.values for axis in reversed(axes)))))


def row_parser(add_options: Callable[[Parser], None], args: Namespace, needs: Sequence[str] = ()) -> Parse:
    """Reads rows that may have the options of `add_options`; those they do not have are as in `args`.

    needs: the fields of a request that must be given in one place or the other.
    """
    parser = RowParser(None, add_help=False)
    add_options(parser)

    def parse(options: Sequence[str]) -> Row:
        read = parser.parse_args(options, Namespace(**{**vars(args), "seed": None}))
        seeded = read.seed is not None
        request = pick(Request, read, seed=read.seed if seeded else args.seed)
        for name in needs:
            if not getattr(request, name):
                raise RequestError(f"--{name.replace('_', '-')} FILE is missing, here and on the command line")
        return Row(request, seeded=seeded)

    return parse


def read_rows(path: str | Path, parse: Parse) -> list[Row]:
    """The rows of a `.txt`, `.jsonl` or `.csv` file in UTF-8, where braces in a prompt stand for several.

    Each line of text is a prompt, with options behind it if it has any (`a castle --seed 7 --scale 9`); the keys of
    JSON and the columns of CSV are the long names of the options. Blank lines are skipped. A line that cannot be read
    is a row with an `error`. Raises RequestError where there is none at all.
    """
    path = Path(path)
    numbered, split = FORMATS.get(path.suffix.lower(), (lines, split_text))
    rows = list(rows_of(path, numbered(read_text(path)), split, parse))
    if not rows:
        raise RequestError(f"{path} has no prompts in it; write one on each line")
    return rows


def rows_of(source: object, numbered: Iterable[tuple[int, Line]], split: Split, parse: Parse) -> Iterator[Row]:
    """The rows that numbered lines stand for."""
    for number, line in numbered:
        place = f"{source}, line {number}"
        try:
            row = parse(split(line))
            prompts = expand_braces(row.request.prompt)
        except ValueError as error:  # a RequestError, or quotes or JSON that do not parse
            text = line.decode(errors="replace") if isinstance(line, bytes) else str(line)
            yield Row(Request(prompt=text.strip()), place, error=str(error))
        else:
            for prompt in prompts:
                yield replace(row, request=replace(row.request, prompt=prompt), place=place)


def check_rows(rows: Iterable[Row], check: Callable[[Request], None] = lambda request: None) -> None:
    """Raise RequestError that lists every row that could not be read, or that `check` raises one for."""
    errors = []
    for row in dict.fromkeys(rows):
        try:
            if row.error:
                raise RequestError(row.error)
            check(row.request)
        except RequestError as error:
            if not row.place:
                raise
            errors.append(f"{row.place}: {error}")
    if errors:
        raise RequestError("\n".join(dict.fromkeys(errors)))


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())


def csv_rows(text: str) -> Iterator[tuple[int, Mapping]]:
    """The rows under the header of a CSV, with the numbers of their first lines."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        number = reader.line_num + 1 if reader.line_num else 2
        if (row := next(reader, None)) is None:
            return
        yield number, row


def split_text(line: str) -> list[str]:
    """A prompt, and behind it options in the quoting of a shell."""
    line = line.strip()
    found = OPTIONS.search(line)
    if not found:
        return [f"--prompt={line}"]
    prompt, options = line[:found.start()].rstrip(), shlex.split(line[found.start():])
    return [f"--prompt={prompt}", *options] if prompt else options


def split_json(line: str) -> list[str]:
    """One JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise RequestError(f"a row must be a JSON object, got {type(row).__name__}")
    return list(options_of(row))


def split_csv(row: Mapping) -> list[str]:
    """Cells by column. An empty cell is no option; true and false are those of JSON."""
    if None in row:
        raise RequestError("it has more cells than there are columns; a comma in a cell needs quotes around the cell")
    return list(options_of({key: meant(key, value) for key, value in row.items() if value}))


def meant(key: str, value: str) -> str | bool:
    """A cell as what it says: but in a prompt, true and false are no words."""
    return value if "prompt" in key and key != "prompt_weights" else WORDS.get(value.lower(), value)


def options_of(row: Mapping) -> Iterator[str]:
    """The options that keys and values stand for; true is an option without a value, false its contrary, null none."""
    for key, value in row.items():
        if value is not None and not isinstance(value, str | int | float):
            raise RequestError(f"{key} must be one value, got {json.dumps(value)}")
        if value is True:
            yield f"--{key}"
        elif value is False:
            yield f"--no-{key}"
        elif value is not None:
            yield f"--{key}={value}"


WORDS = {"true": True, "false": False}
FORMATS = {".jsonl": (lines, split_json), ".csv": (csv_rows, split_csv)}
