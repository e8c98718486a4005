"""How much each word of a prompt counts, in the signs of AUTOMATIC1111's web UI: `a (red:1.3) (fox) on [grass]`."""

import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

# A text and what its words are to be multiplied by.
Weighted = tuple[str, float]

STRONGER = 1.1

TOKEN = re.compile(
    r"""
      \\(?P<escaped>.)
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<bracket>[()\[\]])
    | [^\\:()\[\]]+ | .
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_weights(prompt: str) -> list[Weighted]:
    """Read `(words)` as 1.1 times, `[words]` as 1 / 1.1 times and `(words:1.3)` as 1.3 times their weight.

    Brackets within brackets multiply. A backslash makes the next character plain text. A bracket that is never closed
    reaches to the end of the prompt, and one that was never opened is plain text, as in the web UI. Neighbours of one
    weight are one text; a prompt of nothing is [("", 1.0)].
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for token in TOKEN.finditer(prompt):
        text, escaped, weight, bracket = token.group(0, "escaped", "weight", "bracket")
        if bracket and bracket in opened:
            opened[bracket].append(len(texts))
        elif bracket == ")" and opened["("]:
            close("(", STRONGER)
        elif bracket == "]" and opened["["]:
            close("[", 1 / STRONGER)
        elif weight and opened["("]:
            close("(", float(weight))
        else:
            texts.append(escaped or text)
            weights.append(1.0)
    for bracket, factor in (("(", STRONGER), ("[", 1 / STRONGER)):
        while opened[bracket]:
            close(bracket, factor)

    runs = groupby(zip(texts, weights), key=itemgetter(1))
    return [("".join(text for text, _ in run), weight) for weight, run in runs] or [("", 1.0)]


def plain_text(prompt: Sequence[Weighted]) -> str:
    """The words without their weights. Where a weight changes a word ends: `(foot)ball` reads `foot ball`."""
    return " ".join(text for text, _ in prompt)
