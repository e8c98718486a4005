"""Prompts that change while a picture is made: `a [fox:hare:0.4]` is of a fox, and after 40 % of the steps of a hare.

The signs are those of AUTOMATIC1111's web UI.
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

TOKEN = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
NUMBER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")

# A part of a prompt: the same at every step, or one text a step.
Piece = str | tuple[str, ...]


def prompt_schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """The texts of a prompt over `steps` steps, each with the first step (from 0) that it holds for.

    `[from:to:when]` changes, `[to:when]` adds and `[from::when]` removes: `when` is a number of steps, or under 1 a
    share of them. `[a|b|c]` takes turns, a step each. They may stand in one another. Other brackets, colons and
    escapes (`\\[`) stay as they are, for `parse_weights` to read.
    """
    steps = max(steps, 1)
    # The prompt, and each bracket in it that is still open, itself its first piece; which of them are square.
    opened: list[list[Piece]] = [[]]
    squares: list[int] = []
    for token in TOKEN.findall(prompt):
        if token in ("(", "["):
            squares += [len(opened)] * (token == "[")
            opened.append([token])
        elif token == ")" and opened[-1][:1] == ["("]:
            inner = opened.pop()
            opened[-1].append(join([*inner, ")"], steps))
        elif token == "]" and squares:
            at = squares.pop()
            _, *inner = (piece for pieces in opened[at:] for piece in pieces)
            del opened[at:]
            opened[-1].append(resolve(inner, steps))
        else:
            opened[-1].append(token)
    whole = join([piece for pieces in opened for piece in pieces], steps)
    texts = [whole] if isinstance(whole, str) else whole
    return [(step, text) for step, text in enumerate(texts) if not step or text != texts[step - 1]]


def merge_schedules(schedules: Sequence[Sequence[tuple[int, str]]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Several schedules as one: each step at which any text changes, with all the texts from there on."""
    changes = [dict(schedule) for schedule in schedules]
    texts: list[str] = [""] * len(changes)
    for step in sorted(set().union(*changes)):
        texts = [change.get(step, text) for change, text in zip(changes, texts)]
        yield step, tuple(texts)


def resolve(inner: Sequence[Piece], steps: int) -> Piece:
    """What stands between square brackets: an edit, an alternation, or text in brackets."""
    marks = {piece for piece in inner if piece in (":", "|")}
    if marks == {"|"}:
        options = divide(inner, "|")
        return tuple(at_step(options[step % len(options)], step) for step in range(steps))
    *texts, when = divide(inner, ":")
    number = NUMBER.fullmatch(when[0]) if len(when) == 1 and isinstance(when[0], str) else None
    if marks == {":"} and number and len(texts) <= 2:
        after, before = texts[-1], texts[0] if len(texts) == 2 else []
        said = Decimal(number[1])
        change = int(min(said if said >= 1 else said * steps, steps))
        return tuple(at_step(before if step < change else after, step) for step in range(steps))
    return join(["[", *inner, "]"], steps)


def divide(pieces: Sequence[Piece], mark: str) -> list[list[Piece]]:
    """The pieces between the marks."""
    parts: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece == mark:
            parts.append([])
        else:
            parts[-1].append(piece)
    return parts


def join(pieces: Sequence[Piece], steps: int) -> Piece:
    """Several pieces as one."""
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(pieces)
    return tuple(at_step(pieces, step) for step in range(steps))


def at_step(pieces: Sequence[Piece], step: int) -> str:
    return "".join(piece if isinstance(piece, str) else piece[step] for piece in pieces)
