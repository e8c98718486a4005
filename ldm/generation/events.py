"""What a run tells while it goes on: the path of each file, or every event as a line of JSON. No torch."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

# Called with the name of an event and its facts. The names are stable: the README lists them.
Tell = Callable[..., None]


def as_path(event: str, facts: Mapping[str, Any]) -> str | None:
    """The line for a reader who wants the files alone, or None."""
    return str(facts["path"]) if event == "saved" else None


def as_json(event: str, facts: Mapping[str, Any]) -> str:
    """The line for a program: one JSON object, with the name of the event in `event`."""
    return json.dumps({"event": event, **facts}, default=str)


@contextmanager
def telling(tell: Tell, summary: Any, **facts: Any) -> Iterator[None]:
    """Tell `started` with the facts and, however the block ends, `done` with what the summary (a dataclass) counts."""
    tell("started", **facts)
    begun, end = time.monotonic(), {}
    try:
        yield
    except BaseException as error:
        end["error"] = str(error) or type(error).__name__
        raise
    finally:
        tell("done", **asdict(summary), seconds=round(time.monotonic() - begun, 3), **end)
