"""One line for many prompts: `a {red,blue} fox` is `a red fox` and `a blue fox`."""

import re

from ldm.errors import RequestError

TOKEN = re.compile(r"\\.|[{},]|[^\\{},]+|\\", re.DOTALL)
ESCAPED = {r"\{": "{", r"\}": "}", r"\,": ","}
MOST = 100_000


def expand_braces(text: str) -> list[str]:
    r"""The combinations of `{a,b} c {d,e}`, the last brace changing fastest: `a c d`, `a c e`, `b c d`, `b c e`.

    Alternatives may be empty and may hold braces. `\{`, `\}` and `\,` are the characters themselves; so is a brace
    without its other half or without a comma in it. Raises RequestError for more than 100,000 combinations.
    """
    # The text, and each brace in it that is still open: its alternatives, each as the texts that it stands for so far.
    opened: list[list[list[str]]] = [[[""]]]
    for token in TOKEN.findall(text):
        inside = len(opened) > 1
        if token == "{":
            opened.append([[""]])
        elif token == "," and inside:
            opened[-1].append([""])
        elif token == "}" and inside:
            choices = opened.pop()
            if len(choices) == 1:
                grow(opened, ["{"], *choices, ["}"])
            else:
                grow(opened, [end for choice in choices for end in choice])
        else:
            grow(opened, [ESCAPED.get(token, token)])
    while len(opened) > 1:
        first, *others = opened.pop()
        grow(opened, ["{"], first, *(part for choice in others for part in ([","], choice)))
    return opened[0][0]


def grow(opened: list[list[list[str]]], *parts: list[str]) -> None:
    """Add what follows to the innermost open alternative: any of each part, in order."""
    for part in parts:
        before = opened[-1][-1]
        if len(before) * len(part) > MOST:
            raise RequestError(f"the braces of a prompt stand for more than {MOST:,} prompts: use fewer of them")
        opened[-1][-1] = [start + end for start in before for end in part]
