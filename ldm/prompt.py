"""Prompts as text and tokens: nothing here knows a model."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# How CLIP's byte-pair vocabulary spells the end of a word, and the words that end a clause.
WORD_END = "</w>"
CLAUSE_ENDS = frozenset(mark + WORD_END for mark in (",", ".", ";", ":", "!", "?"))


def chunk(items: Sequence[T], tokens: Sequence[str], size: int = 75, reach: int = 20) -> list[list[T]]:
    """Cut `items`, one for each of `tokens`, into runs of at most `size`; no item gives one empty run.

    Each run ends after the last comma or full stop within `reach` of its end, else after a word, else where it is full.
    """
    def strength(stop: int) -> tuple[int, int]:
        token = tokens[stop - 1]
        return (token in CLAUSE_ENDS) + token.endswith(WORD_END), stop

    runs, start = [], 0
    while len(items) - start > size:
        full = start + size
        stop = max(range(max(start, full - reach) + 1, full + 1), key=strength)
        runs.append(list(items[start:stop]))
        start = stop
    return [*runs, list(items[start:])]
