"""The plan of a run: which pictures it makes, and which of them are drawn together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ldm.generation.record import OF_A_PICTURE
from ldm.generation.request import Request
from ldm.generation.rows import Row

AHEAD = 16  # batches: how far a row is looked for that can join another


@dataclass(frozen=True)
class Job:
    """A picture of a run: its number in it, from 0, and where its row was read."""

    index: int
    request: Request
    place: str = ""


def plan(rows: Sequence[Row], batch_size: int, n_iter: int) -> Iterator[list[Job]]:
    """Go n_iter times through the rows, in batches whose settings are the same, each begun in the order of the rows.

    With seed_mode "image" the k-th picture of the run gets seed + k, and a row with a seed of its own that, and in
    the rounds after the first the next ones. The same rows always make the same plan.
    """
    window = AHEAD * batch_size
    for number in range(n_iter):
        for start in range(0, len(rows), window):
            alike: dict[Request, list[Job]] = {}
            for index, row in enumerate(rows[start:start + window], number * len(rows) + start):
                request = row.request
                if request.seed_mode == "image":
                    request = replace(request, seed=request.seed + (number if row.seeded else index))
                alike.setdefault(settings(request), []).append(Job(index, request, row.place))
            batches = [jobs[i:i + batch_size] for jobs in alike.values() for i in range(0, len(jobs), batch_size)]
            yield from sorted(batches, key=lambda batch: batch[0].index)


def settings(request: Request) -> Request:
    """The request without what the pictures of one batch may differ in."""
    same = {name: getattr(Request, name) for name in OF_A_PICTURE}
    if request.seed_mode == "run":
        del same["seed"]
    return replace(request, **same)
