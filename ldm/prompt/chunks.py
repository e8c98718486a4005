"""Where a prompt that is too long for one pass of the text encoder is cut."""

from collections.abc import Sequence

CLAUSE_ENDS = frozenset(",.;:!?")


def split(text: str, spans: Sequence[tuple[int, int]], size: int = 75, reach: int = 20) -> list[slice]:
    """Cut the tokens of a text, given as their (start, end) in it, into runs of at most `size`.

    Each run ends after the last comma or full stop within `reach` of its end, else after a word, else where it is full;
    no tokens give one empty run.
    """
    def strength(stop: int) -> tuple[int, int]:
        start, end = spans[stop - 1]
        if text[start:end].strip() in CLAUSE_ENDS:
            return 2, stop
        inside_a_word = text[end - 1:end].isalnum() and text[end:end + 1].isalnum()
        inside_a_token = spans[stop] == spans[stop - 1]  # one of several for the same piece of text: a learned word
        return int(not (inside_a_word or inside_a_token)), stop

    runs, start = [], 0
    while len(spans) - start > size:
        full = start + size
        stop = max(range(max(start, full - reach) + 1, full + 1), key=strength)
        runs.append(slice(start, stop))
        start = stop
    return [*runs, slice(start, len(spans))]
