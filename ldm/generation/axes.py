"""The axes of --xy: an option, and the values that it takes along one side of a grid. Standard library only."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.errors import RequestError

FORM = '--xy takes one or two of OPTION=VALUE,VALUE, such as "steps=10,20,50" "scale=3,7.5"'


@dataclass(frozen=True)
class Axis:
    """The long name of an option, without its dashes, and its values as they would be typed."""

    name: str
    values: tuple[str, ...]


def read_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of --xy, the one across the grid first. Raises RequestError."""
    axes = tuple(map(read_axis, texts))
    if len(axes) > 2:
        raise RequestError(f"{FORM}; got {len(axes)}")
    if len({axis.name for axis in axes}) < len(axes):
        raise RequestError(f"--xy lays out two options, got {axes[0].name} twice")
    return axes


def read_axis(text: str) -> Axis:
    """`steps=10,20,50`; a value with a comma in it is quoted, as in CSV: `prompt="a fox, red",a hare`."""
    name, equals, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not name or not equals or not values.strip():
        raise RequestError(f"{FORM}; got {text!r}")
    return Axis(name, tuple(next(csv.reader([values], skipinitialspace=True))))
