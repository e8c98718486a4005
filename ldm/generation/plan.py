"""The plan of a run: which pictures it makes, and which of them are drawn together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ldm.generation.options import AHEAD
from ldm.generation.record import OF_A_PICTURE
from ldm.generation.request import Request
from ldm.generation.rows import Row


@dataclass(frozen=True)
class Job:
    """A picture of a run: its number in it, from 0, where its row was read, and why that cannot be drawn."""

    index: int
    request: Request
    place: str = ""
    error: str = ""


def plan(rows: Sequence[Row], batch_size: int, n_iter: int, first: int = 0) -> Iterator[list[Job]]:
    """Go n_iter times through the rows, in batches whose settings are the same, each begun in the order of the rows.

    With seed_mode "image" the k-th picture of the run gets seed + k, and a row with a seed of its own that, and in
    the rounds after the first the next ones. first: the number of the first picture. The same rows always make the
    same plan. Rows with an error are in batches of their own.
    """
    window = AHEAD * batch_size
    for number in range(n_iter):
        for start in range(0, len(rows), window):
            alike: dict[tuple[Request, str], list[Job]] = {}
            for index, row in enumerate(rows[start:start + window], first + number * len(rows) + start):
                request = row.request
                if request.seed_mode == "image":
                    request = replace(request, seed=request.seed + (number if row.seeded else index))
                job = Job(index, request, row.place, row.error)
                alike.setdefault((settings(request), row.error), []).append(job)
            batches = [jobs[i:i + batch_size] for jobs in alike.values() for i in range(0, len(jobs), batch_size)]
            yield from sorted(batches, key=lambda batch: batch[0].index)


def rounds(rows: Sequence[Row], n_iter: int) -> list[Row]:
    """Each row n_iter times, one after the other: as many pictures of it as `plan` makes in so many rounds."""
    def again(row: Row, number: int) -> Row:
        moved = row.seeded and row.request.seed_mode == "image"
        return replace(row, request=row.request.with_seed(row.request.seed + number)) if moved else row

    return [again(row, number) for row in rows for number in range(n_iter)]


def settings(request: Request) -> Request:
    """The request without what the pictures of one batch may differ in."""
    same = {name: getattr(Request, name) for name in OF_A_PICTURE}
    if request.seed_mode == "run":
        del same["seed"]
    return replace(request, **same)
