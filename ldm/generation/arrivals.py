"""Rows from a pipe, drawn as they come: `--from-file -`. Standard library only."""

import os
import threading
from collections.abc import Iterable, Iterator
from queue import Queue

from ldm.errors import RequestError
from ldm.generation.rows import Parse, Row, rows_of, split_text

SOURCE = "standard input"


class Arrivals:
    """Lists of the rows that are waiting, until the pipe ends; an empty one tells that there are none at the moment.

    A thread reads the pipe, a file descriptor, as far ahead as `most` rows. A line is as in a .txt file; one that
    cannot be read is a row with an error. Raises RequestError where the pipe cannot be read, or ends without a row.
    """

    def __init__(self, pipe: int, parse: Parse, most: int):
        self._most = most
        self._waiting: Queue[Row | RequestError | None] = Queue(most)
        # A daemon, for it may hang in a pipe that nobody writes to when the run is over.
        threading.Thread(target=self._read, args=(pipe, parse), daemon=True).start()

    def _read(self, pipe: int, parse: Parse) -> None:
        try:
            for row in rows_of(SOURCE, numbered(lines(pipe)), split_bytes, parse):
                self._waiting.put(row)
            self._waiting.put(None)
        except OSError as error:
            self._waiting.put(RequestError(f"cannot read {SOURCE}: {error.strerror}"))

    def __iter__(self) -> Iterator[list[Row]]:
        ended, empty = False, True
        while not ended:
            if self._waiting.empty():
                yield []
            found = [self._waiting.get()]
            while len(found) < self._most and not self._waiting.empty():
                found.append(self._waiting.get())
            if ended := not isinstance(found[-1], Row):
                last = found.pop()
            if found:
                yield found
                empty = False
        if last is not None:
            raise last
        if empty:
            raise RequestError(f"{SOURCE} has no prompts in it; write one on each line")


def lines(pipe: int) -> Iterator[bytes]:
    """Each line as soon as it is whole, or cut off by the end."""
    rest = b""
    # Not sys.stdin: at its exit, Python waits for the lock of a reader that a thread hangs in.
    while part := os.read(pipe, 1 << 16):
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
    if rest:
        yield rest


def numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def split_bytes(line: bytes) -> list[str]:
    """As `split_text`. Raises RequestError for what is not UTF-8."""
    try:
        return split_text(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError("it is not UTF-8") from error
