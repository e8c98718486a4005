"""Tables of what was measured: as text, CSV and JSON, and the guidance curve as a plot."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from ldm.evaluation.measures import Table
from ldm.util import optional


def lines(table: Table) -> Iterator[str]:
    """The table as text, in columns."""
    cells = [list(table.rows[0]), *([show(value) for value in row.values()] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def show(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write(table: Table, outdir: Path) -> list[Path]:
    """Write NAME.csv, NAME.json with all the facts, and of the curve a plot, over those of an earlier evaluation."""
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, list(table.rows[0]))
    rows.writeheader()
    rows.writerows(table.rows)
    as_csv, as_json = (outdir / f"{table.name}.{suffix}" for suffix in ("csv", "json"))
    as_csv.write_text(text.getvalue(), encoding="utf-8", newline="")
    as_json.write_text(json.dumps({**table.facts, "rows": table.rows}, indent=2) + "\n", encoding="utf-8")
    return [as_csv, as_json, *([plot(table, outdir / "curve.png")] if table.name == "curve" else [])]


def plot(table: Table, path: Path) -> Path:
    """The Fréchet distance over the CLIP score, each point with its guidance scale. Raises MissingExtra."""
    figure = optional("matplotlib.figure", "eval").Figure(figsize=(5, 3.6), layout="constrained")
    distance = list(table.rows[0])[-1]
    across, up, scales = ([row[name] for row in table.rows] for name in ("clip_score", distance, "scale"))
    axes = figure.add_subplot()
    axes.plot(across, up, marker="o", markersize=4)
    for x, y, scale in zip(across, up, scales):
        axes.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xlabel="CLIP score", ylabel=label(distance), title=f"{table.facts['sampler']}, n = {table.facts['n']}")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    return path


def label(distance: str) -> str:
    """What the axis of a distance is called; FID is on the features of Inception alone."""
    return {"fid": "FID (Inception)", "frechet_clip": "Fréchet distance (CLIP features)"}.get(distance, distance)
