"""The exact score of the shapes world: what a picture shows, read from its pixels by geometry, against its caption.

Colours come from the palette, objects from connected areas of one colour, and an object's shape from the overlap with
each ideal shape once both have the same centroid and area. What is not clearly one of the eight has no shape.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.data.shapes import COLOURS, RING_HOLE, SHAPES, SIZES, Caption, Noun, Thing, coverage, holds, outline, parse
from ldm.errors import ImageError

SIDE = 128  # pictures of another size are read at this one
COLOUR_TOLERANCE = 50.0  # the farthest that a pixel may be from a palette colour, in levels over the three channels
SIZE_TOLERANCE = 0.03  # how far a span may lie outside the range of its word
MIN_AREA = 0.003  # of the picture: smaller patches are specks, not objects
MAX_STRAY = 0.01  # of the picture: specks and foreign colours beyond this are something that the caption does not name
RIM = 2  # pixels on either side of an object's edge in which mixed colours are expected
SPECK = 1  # areas no wider than twice this are edges or noise

FRAME = 48  # shapes are compared in a frame of so many pixels ...
FRAME_WIDTH = 2.2  # ... whose side is so many times the square root of their area
ANGLES = range(-12, 13, 2)
FITS = (0.95, 1.0, 1.05)  # scales about that of equal area
MAX_DEVIATION = 0.016  # of an outline from the ideal one, on average over its length, as a part of the span
MIN_LEAD = 0.05  # of the best shape's overlap over the next shape's

PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = list(COLOURS)
UNKNOWN = len(NAMES)


@dataclass(frozen=True, eq=False)
class Seen(Thing):
    """An object as read: a word is None where it is not clear. `overlap` is the fit of the shape, `mask` its pixels."""

    overlap: float
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Reading:
    """What a picture shows: objects from the largest to the smallest, and the part of it that nothing explains."""

    background: str | None
    objects: tuple[Seen, ...]
    stray: float

    def relation(self) -> str | None:
        """How the first of two objects lies to the second, along the axis on which they are farther apart."""
        if len(self.objects) != 2:
            return None
        first, second = self.objects
        across = abs(second.x - first.x) > abs(second.y - first.y)
        names = ("left of", "right of") if across else ("above", "below")
        return next((name for name in names if holds(name, first, second)), None)


@dataclass(frozen=True)
class Score:
    """Which attributes of a caption a picture has right; an attribute that the caption does not name is right."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    size: bool
    relation: bool

    @property
    def right(self) -> bool:
        """Whether every attribute is right."""
        return all((self.background, self.count, self.colour, self.shape, self.size, self.relation))


def score(picture: Image.Image | np.ndarray | Reading, caption: Caption | str) -> Score:
    """Compare a picture with a caption, pairing what is seen with what is named so that most words agree.

    picture: RGB, an array is uint8 (h, w, 3). Raises ImageError for one that is not square, RequestError for a caption
    outside the grammar.
    """
    reading = picture if isinstance(picture, Reading) else read(picture)
    caption = parse(caption) if isinstance(caption, str) else caption
    nouns = caption.objects
    candidates = [*reading.objects[:4], *[None] * len(nouns)]
    things = max(permutations(candidates, len(nouns)), key=lambda things: sum(map(_agreement, nouns, things)))
    return Score(
        background=reading.background == caption.background,
        count=len(reading.objects) == len(nouns) and reading.stray <= MAX_STRAY,
        colour=all(thing is not None and thing.colour == noun.colour for noun, thing in zip(nouns, things)),
        shape=all(thing is not None and thing.shape == noun.shape for noun, thing in zip(nouns, things)),
        size=all(thing is not None and noun.size in (None, thing.size) for noun, thing in zip(nouns, things)),
        relation=caption.relation is None or (None not in things and holds(caption.relation, *things)),
    )


def _agreement(noun: Noun, thing: Seen | None) -> int:
    if thing is None:
        return 0
    return 1 + 2 * (thing.colour == noun.colour) + (thing.shape == noun.shape) + (noun.size in (None, thing.size))


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boolean masks of one shape; 1 where both are empty."""
    union = np.count_nonzero(mask | other)
    return np.count_nonzero(mask & other) / union if union else 1.0


# Reading --------------------------------------------------------------------------------------------------------------


def read(picture: Image.Image | np.ndarray) -> Reading:
    """Read a picture of the shapes world: RGB, square; an array is uint8 (h, w, 3). Masks are bool (128, 128).

    Raises ImageError for a picture that is not square.
    """
    pixels = _pixels(picture)
    labels = _nearest_colour(pixels)
    frame = np.ones(labels.shape, bool)
    frame[RIM:-RIM, RIM:-RIM] = False
    background = int(np.bincount(labels[frame]).argmax())
    ground = pixels[labels == background].mean(axis=0)

    common = np.flatnonzero(np.bincount(labels.ravel()) >= MIN_AREA * labels.size)
    seeds = [(label, seed) for label in common if label not in (background, UNKNOWN)
             for seed in _patches(_grown(_shrunk(labels == label, SPECK), SPECK))]
    taken = np.any([seed for _, seed in seeds], axis=0) if seeds else np.zeros(labels.shape, bool)

    objects, explained = [], labels == background
    for label, seed in seeds:
        alpha = _outlined(pixels, ground, seed, seed | ~taken)
        thing = _recognised(NAMES[label], alpha)
        explained |= thing.mask & (labels == label) | _grown(thing.mask, RIM) & ~_shrunk(thing.mask, RIM)
        objects.append(thing)
    objects.sort(key=lambda thing: -np.count_nonzero(thing.mask))
    return Reading(
        background=None if background == UNKNOWN else NAMES[background],
        objects=tuple(objects),
        stray=1 - float(explained.mean()),
    )


def _pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    """The picture as float32 (128, 128, 3) in levels of 255."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.width != image.height:
        raise ImageError(f"a picture of the shapes world is square, got {image.width}x{image.height}")
    image = image.convert("RGB")
    if image.width != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32)


@cache
def _colour_table() -> np.ndarray:
    """The nearest palette colour, or UNKNOWN, of every colour in steps of 4 levels: uint8 (64, 64, 64)."""
    steps = np.arange(64, dtype=np.float32) * 4 + 1.5
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    distances = np.stack([np.linalg.norm(colours - colour, axis=-1) for colour in PALETTE], axis=-1)
    return np.where(distances.min(axis=-1) <= COLOUR_TOLERANCE, distances.argmin(axis=-1), UNKNOWN).astype(np.uint8)


def _nearest_colour(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.uint8) >> 2, -1, 0)
    return _colour_table()[red, green, blue]


def _outlined(pixels: np.ndarray, ground: np.ndarray, seed: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """How much of each pixel the object around a patch of its colour covers: float32 (h, w) in [0, 1]."""
    toward = pixels[seed].mean(axis=0) - ground
    # How far each pixel is on the way from the background to the object: the edge is at one half. The slope is doubled,
    # so that light and noise on either side of the edge do not count.
    share = (pixels - ground) @ (toward / max(toward @ toward, 1.0))
    alpha = np.where(allowed, np.clip(2 * share - 0.5, 0, 1), 0)
    bodies = [patch for patch in _patches(alpha >= 0.5) if (patch & seed).any()]
    if not bodies:
        return seed.astype(np.float32)
    inside = max(bodies, key=lambda patch: np.count_nonzero(patch & seed))
    return np.where(_grown(inside, 1), alpha, 0).astype(np.float32)


def _recognised(colour: str, alpha: np.ndarray) -> Seen:
    """The object that covers `alpha`: of the shape that overlaps it best, if it does so clearly."""
    framed, centroid, scale = _framed(alpha)
    ideals = _ideals()
    overlaps = _overlaps(framed)
    best = int(overlaps.argmax())
    shape = ideals.shapes[best]
    lead = overlaps[best] - overlaps[ideals.shapes != shape].max()
    mask = alpha >= 0.5
    holes = len(_patches(~mask)) - 1
    clear = (
        1 - overlaps[best] <= MAX_DEVIATION * ideals.lengths[best]
        and lead >= MIN_LEAD
        and holes == (1 if shape == "ring" else 0)
    )
    x, y, span = _placed(best, centroid, scale)
    sizes = (size for size, (low, high) in SIZES.items() if low - SIZE_TOLERANCE <= span <= high + SIZE_TOLERANCE)
    return Seen(
        colour=colour,
        shape=str(shape) if clear else None,
        size=next(sizes, None),
        x=x,
        y=y,
        span=span,
        rotation=float(ideals.angles[best]),
        overlap=float(overlaps[best]),
        mask=mask,
    )


def fitted(seen: Seen, noun: Noun) -> Thing:
    """What a noun names, in the place, span and rotation that overlap best with something seen, whatever that is."""
    framed, centroid, scale = _framed(seen.mask.astype(np.float32))
    ideals = _ideals()
    best = int(np.where(ideals.shapes == noun.shape, _overlaps(framed), -1).argmax())
    return Thing(noun.colour, noun.shape, noun.size, *_placed(best, centroid, scale), float(ideals.angles[best]))


def _overlaps(framed: np.ndarray) -> np.ndarray:
    """Intersection over union of a framed area with each of the ideals."""
    frames = _ideals().frames
    smaller = np.minimum(frames, framed).sum(axis=(1, 2))
    return smaller / (frames.sum(axis=(1, 2)) + framed.sum() - smaller)


def _placed(ideal: int, centroid: tuple[float, float], scale: float) -> tuple[float, float, float]:
    """The centre and span, in sides of the picture, of an ideal of a centroid and a root of the area in pixels."""
    (x, y), (dx, dy) = centroid, _ideals().centres[ideal] * scale
    return float(x + dx) / SIDE, float(y + dy) / SIDE, float(_ideals().spans[ideal] * scale / SIDE)


def _framed(alpha: np.ndarray, fit: float = 1.0) -> tuple[np.ndarray, tuple[float, float], float]:
    """Bring a covered area to size `fit` about its centroid: (48, 48), the centroid in pixels, the root of the area."""
    area = alpha.sum()
    scale = float(area) ** 0.5
    x = float(alpha.sum(axis=0) @ (np.arange(alpha.shape[1]) + 0.5) / area)
    y = float(alpha.sum(axis=1) @ (np.arange(alpha.shape[0]) + 0.5) / area)
    reach = FRAME_WIDTH * scale / fit / 2
    pad = int(reach) + 1
    box = (x + pad - reach, y + pad - reach, x + pad + reach, y + pad + reach)
    frame = Image.fromarray(np.pad(alpha, pad)).resize((FRAME, FRAME), Image.Resampling.BILINEAR, box)
    return np.asarray(frame), (x, y), scale


class _Ideals(NamedTuple):
    """Every shape at every angle and fit; spans and centres (from the centroid) in roots of the area they are found in.

    `lengths` is the outline's length times the span over the area: so many parts of the area are lost or won where the
    outline is off by one span everywhere.
    """

    shapes: np.ndarray
    angles: np.ndarray
    frames: np.ndarray
    spans: np.ndarray
    centres: np.ndarray
    lengths: np.ndarray


@cache
def _ideals() -> _Ideals:
    def ideal(shape: str, angle: float, fit: float) -> tuple:
        mask, box = coverage(Thing("black", shape, None, 0.5, 0.5, 0.6, angle), SIDE)
        alpha = np.zeros((SIDE, SIDE), np.float32)
        alpha[box] = mask
        frame, centroid, scale = _framed(alpha, fit)
        span = 0.6 * SIDE / scale
        length = np.linalg.norm(np.diff(outline(shape), axis=0, append=outline(shape)[:1]), axis=1).sum()
        length *= 1 + RING_HOLE if shape == "ring" else 1
        return shape, angle, frame, span * fit, (SIDE / 2 - np.array(centroid)) / scale * fit, length * span**2

    kinds = [(shape, angle, fit) for shape in SHAPES for angle in ((0,) if shape in ("circle", "ring") else ANGLES)
             for fit in FITS]
    return _Ideals(*map(np.array, zip(*(ideal(*kind) for kind in kinds))))


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and every pixel within a square of so many pixels around it."""
    tall = mask.copy()
    for step in range(1, pixels + 1):
        tall[step:] |= mask[:-step]
        tall[:-step] |= mask[step:]
    grown = tall.copy()
    for step in range(1, pixels + 1):
        grown[:, step:] |= tall[:, :-step]
        grown[:, :-step] |= tall[:, step:]
    return grown


def _shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    return ~_grown(~mask, pixels)


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected areas of a mask that are no specks, each as a mask.

    Runs of pixels are joined with the runs that they touch in the row above.
    """
    padded = np.pad(mask, ((0, 0), (1, 1)))
    rows, changes = np.divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), mask.shape[1] + 1)
    rows, starts, ends = rows[::2].tolist(), changes[::2].tolist(), changes[1::2].tolist()
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0
    for run, (row, start, end) in enumerate(zip(rows, starts, ends)):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= start):
            above += 1
        touching = above
        while rows[touching] == row - 1 and starts[touching] < end:
            parent[root(touching)] = root(run)
            touching += 1

    areas: dict[int, list] = {}
    for run, (row, start, end) in enumerate(zip(rows, starts, ends)):
        areas.setdefault(root(run), []).append((row, start, end))
    patches = []
    for runs in areas.values():
        if sum(end - start for _, start, end in runs) >= MIN_AREA * mask.size:
            patches.append(np.zeros(mask.shape, bool))
            for row, start, end in runs:
                patches[-1][row, start:end] = True
    return patches
