"""The shapes world: captioned scenes of one or two coloured shapes, drawn by rule, any number from a seed.

    a {small|large} {colour} {shape} on a {background} background
    a {colour} {shape} {left of|right of|above|below} a {colour} {shape} on a {background} background

Lengths are fractions of the picture's side, x to the right and y down; rotations are in degrees.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ldm.errors import RequestError

COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 98, 214),
    "yellow": (236, 200, 50),
    "purple": (142, 68, 173),
    "orange": (232, 126, 36),
    "pink": (236, 130, 176),
    "cyan": (70, 190, 210),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
SIZES = {"small": (0.20, 0.28), "large": (0.40, 0.55)}  # the span of an object alone in its picture
PAIR_SIZE = (0.24, 0.34)  # the span of an object of two
MAX_ROTATION = 8.0

# Each relation as the axis (0: x, 1: y) and the sign of "centre of the second object minus centre of the first".
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MIN_DISTANCE = 0.25  # between the centres, along the axis of the relation

SPLITS = ("train", "all", "held_out")
FORMS = (
    "a {small|large} {colour} {shape} on a {background} background",
    "a {colour} {shape} {left of|right of|above|below} a {colour} {shape} on a {background} background",
)

EDGE, GAP = 0.03, 0.06  # the least room between an object and the edge, and between two objects
BACKGROUND_LIGHT, OBJECT_LIGHT = 6.0, 8.0  # how far the light brightens or darkens, in levels of 255
SUPERSAMPLING = 4


# Words ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noun:
    """An object as a caption names it; `size` is None for an object of two."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Caption:
    """What a caption says; `str()` gives its text. Raises RequestError for what the grammar cannot say."""

    objects: tuple[Noun, ...]
    background: str
    relation: str | None = None

    def __post_init__(self):
        for noun in self.objects:
            _check_word("colour", noun.colour, COLOURS)
            _check_word("shape", noun.shape, SHAPES)
        _check_word("background", self.background, COLOURS)
        match self.objects:
            case (Noun(size=size),) if self.relation is None:
                _check_word("size", size, SIZES)
            case (Noun(size=None), Noun(size=None)) if self.relation is not None:
                _check_word("relation", self.relation, RELATIONS)
            case _:
                raise RequestError("a caption names one object with its size, or two with their relation and no size")
        colours = [self.background, *(noun.colour for noun in self.objects)]
        if len(set(colours)) < len(colours):
            raise RequestError(f"objects and background must differ in colour, got {', '.join(colours)}")

    def __str__(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.objects))} on a {self.background} background"

    @property
    def is_held_out(self) -> bool:
        """Whether any object's triple with the background is one that training never shows."""
        return any((noun.colour, noun.shape, self.background) in held_out_triples() for noun in self.objects)


def _check_word(kind: str, word: str | None, known) -> None:
    if word not in known:
        raise RequestError(f"the shapes world knows no {kind} {word!r}; it knows {', '.join(known)}")


_ONE = re.compile(r"a (\w+) (\w+) (\w+) on a (\w+) background")
_TWO = re.compile(rf"a (\w+) (\w+) ({'|'.join(RELATIONS)}) a (\w+) (\w+) on a (\w+) background")


def parse(text: str) -> Caption:
    """Read a caption, in capitals or not. Raises RequestError for text outside the grammar: the word or the forms."""
    words = " ".join(text.lower().split())
    if match := _TWO.fullmatch(words):
        colour, shape, relation, other_colour, other_shape, background = match.groups()
        return Caption((Noun(colour, shape), Noun(other_colour, other_shape)), background, relation)
    if match := _ONE.fullmatch(words):
        size, colour, shape, background = match.groups()
        return Caption((Noun(colour, shape, size),), background)
    raise RequestError(f"{text!r} is no caption of the shapes world, which reads {FORMS[0]!r} or {FORMS[1]!r}")


@cache
def held_out_triples() -> frozenset[tuple[str, str, str]]:
    """The tenth of all (colour, shape, background) whose words hash lowest: never shown in training."""
    triples = [triple for triple in itertools.product(COLOURS, SHAPES, COLOURS) if triple[0] != triple[2]]
    triples.sort(key=lambda triple: hashlib.sha256(" ".join(triple).encode()).digest())
    return frozenset(triples[: len(triples) // 10])


def _in_split(caption: Caption, split: str) -> bool:
    _check_word("split", split, SPLITS)
    return split == "all" or caption.is_held_out == (split == "held_out")


def sample_caption(rng: Random, split: str = "train", pairs: float = 0.5) -> Caption:
    """A caption drawn evenly from a split, naming two objects with probability `pairs`.

    Of a held-out caption for two objects, at least one object's triple is held out.
    """
    two = rng.random() < pairs
    while True:
        colour, other, background = rng.sample(list(COLOURS), 3)
        shape, other_shape = rng.choices(SHAPES, k=2)
        if two:
            caption = Caption((Noun(colour, shape), Noun(other, other_shape)), background, rng.choice(list(RELATIONS)))
        else:
            caption = Caption((Noun(colour, shape, rng.choice(list(SIZES))),), background)
        if _in_split(caption, split):
            return caption


def hard_negatives(caption: Caption | str, rng: Random, split: str = "train") -> list[str]:
    """Captions that are nearly this one and yet false of its picture, in random order; four at least.

    Colours or shapes exchanged, the relation turned, one word replaced. Those outside `split` are left out: a text
    that training met as a negative alone would be pushed away from its own picture.
    """
    caption = parse(caption) if isinstance(caption, str) else caption
    colours = [name for name in COLOURS if name not in {caption.background, *(noun.colour for noun in caption.objects)}]

    def with_object(index: int, **changes) -> Caption:
        objects = list(caption.objects)
        objects[index] = replace(objects[index], **changes)
        return replace(caption, objects=tuple(objects))

    index = rng.randrange(len(caption.objects))
    noun = caption.objects[index]
    kinds = [
        [with_object(index, colour=colour) for colour in colours],
        [with_object(index, shape=shape) for shape in SHAPES if shape != noun.shape],
        [replace(caption, background=colour) for colour in colours],
    ]
    if caption.relation is None:
        kinds.append([with_object(0, size=size) for size in SIZES if size != noun.size])
        kinds.append([Caption((replace(noun, colour=caption.background),), noun.colour)])
    else:
        first, second = caption.objects
        colours_exchanged = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        kinds.append([replace(caption, objects=colours_exchanged)])
        kinds.append([replace(caption, relation=OPPOSITE[caption.relation])])
        kinds.append([replace(caption, relation=other) for other in RELATIONS
                      if RELATIONS[other][0] != RELATIONS[caption.relation][0]])
        if first.shape != second.shape:
            shapes_exchanged = (replace(first, shape=second.shape), replace(second, shape=first.shape))
            kinds.append([replace(caption, objects=shapes_exchanged)])
    allowed = ([other for other in kind if _in_split(other, split)] for kind in kinds)
    negatives = [str(rng.choice(kind)) for kind in allowed if kind]
    rng.shuffle(negatives)
    return negatives


# Places ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """An object in its place: (x, y) is the centre of the upright shape's box, `span` that box's longer side."""

    colour: str
    shape: str
    size: str | None
    x: float
    y: float
    span: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `light` is the direction that the light comes from, in degrees."""

    background: str
    objects: tuple[Thing, ...]
    relation: str | None
    light: float


def caption(scene: Scene) -> str:
    """The text that is true of a scene."""
    nouns = tuple(Noun(thing.colour, thing.shape, thing.size) for thing in scene.objects)
    return str(Caption(nouns, scene.background, scene.relation))


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether `first` is left of, right of, above or below `second`: by the centres, by a quarter of the side."""
    axis, sign = RELATIONS[relation]
    return sign * ((second.x, second.y)[axis] - (first.x, first.y)[axis]) >= MIN_DISTANCE


def sample_scene(rng: Random, split: str = "train", pairs: float = 0.5) -> Scene:
    """A scene whose caption is drawn from a split: `train`, `held_out` or `all`."""
    return scene_for(sample_caption(rng, split, pairs), rng)


def scene_for(caption: Caption | str, rng: Random) -> Scene:
    """A scene of which a caption is true; sizes, places, rotations and light are drawn by `rng`."""
    caption = parse(caption) if isinstance(caption, str) else caption
    spans = [rng.uniform(*(SIZES[noun.size] if noun.size else PAIR_SIZE)) for noun in caption.objects]
    rotations = [rng.uniform(-MAX_ROTATION, MAX_ROTATION) for _ in caption.objects]
    boxes = [_box(noun.shape, span, rotation) for noun, span, rotation in zip(caption.objects, spans, rotations)]
    centres = _place_two(boxes, caption.relation, rng) if caption.relation else [_place_one(boxes[0], rng)]
    things = tuple(Thing(noun.colour, noun.shape, noun.size, *centre, span, rotation)
                   for noun, centre, span, rotation in zip(caption.objects, centres, spans, rotations))
    return Scene(caption.background, things, caption.relation, rng.uniform(0, 360))


def allowed(thing: Thing) -> Thing:
    """A thing as near as the world lets it come: its span and rotation within their ranges, all of it off the edge."""
    low, high = SIZES[thing.size] if thing.size else PAIR_SIZE
    span = min(max(thing.span, low), high)
    rotation = min(max(thing.rotation, -MAX_ROTATION), MAX_ROTATION)
    before, after = _box(thing.shape, span, rotation)
    x, y = np.clip((thing.x, thing.y), EDGE + before, 1 - EDGE - after).tolist()
    return replace(thing, x=x, y=y, span=span, rotation=rotation)


def _box(shape: str, span: float, rotation: float) -> tuple[np.ndarray, np.ndarray]:
    """How far a shape reaches from its centre: ((-x, -y), (+x, +y)), all positive."""
    points = _turned(outline(shape), rotation) * span
    return -points.min(axis=0), points.max(axis=0)


def _along(low: float, high: float, rng: Random) -> float:
    """A coordinate for an object that reaches `low` below and `high` above it."""
    return rng.uniform(EDGE + low, 1 - EDGE - high)


def _place_one(box, rng: Random) -> tuple[float, float]:
    (left, top), (right, bottom) = box
    return _along(left, right, rng), _along(top, bottom, rng)


def _place_two(boxes, relation: str, rng: Random) -> list[tuple[float, float]]:
    """Two centres for which this relation holds and no other: at most half as far apart across it as along it."""
    axis, sign = RELATIONS[relation]
    (low, high), (next_low, next_high) = boxes if sign > 0 else boxes[::-1]
    # A tenth more than the rule asks, so that a reading to the nearest pixel agrees.
    nearest = max(1.1 * MIN_DISTANCE, high[axis] + GAP + next_low[axis])
    room = 1 - 2 * EDGE - low[axis] - nearest - next_high[axis]
    before, after = sorted(rng.uniform(0, room) for _ in range(2))
    start, end = EDGE + low[axis] + before, EDGE + low[axis] + nearest + after
    while True:
        start_across = _along(low[1 - axis], high[1 - axis], rng)
        end_across = _along(next_low[1 - axis], next_high[1 - axis], rng)
        if abs(end_across - start_across) <= min((end - start) / 2, 0.8 * MIN_DISTANCE):
            break
    centres = [(start, start_across), (end, end_across)][::sign]
    return [centre if axis == 0 else centre[::-1] for centre in centres]


# Pictures -------------------------------------------------------------------------------------------------------------


@cache
def outline(shape: str) -> np.ndarray:
    """The upright outline (n, 2) of a shape in a box of longer side 1 about the origin; of a ring, the outer circle."""
    turn = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    match shape:
        case "circle" | "ring":
            points = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        case "square":
            points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        case "triangle":
            points = np.array([[0, -(3**0.5)], [1, 0], [-1, 0]])
        case "star":
            angle = np.arange(10) * np.pi / 5
            points = np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.where(np.arange(10) % 2, 0.45, 1)[:, None]
        case "diamond":
            points = np.array([[0, -4], [3, 0], [0, 4], [-3, 0]])
        case "cross":
            corner = np.array([[-1, -3], [1, -3], [1, -1]])
            points = np.concatenate([_turned(corner, angle) for angle in (0, 90, 180, 270)])
        case "heart":
            across = 16 * np.sin(turn) ** 3
            up = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            points = np.stack([across, -up], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()


RING_HOLE = 0.54  # the diameter of a ring's hole, as a part of the ring's own


def _turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Points (n, 2) turned clockwise, as seen with y down."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def coverage(thing: Thing, side: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """How much of each pixel an object covers, float32 (h, w) in [0, 1], and the rows and columns that it lies in."""
    centre = np.array([thing.x, thing.y]) * side
    spokes = _turned(outline(thing.shape), thing.rotation) * thing.span * side
    low = np.floor((centre + spokes).min(axis=0)).astype(int)
    high = np.ceil((centre + spokes).max(axis=0)).astype(int)
    canvas = Image.new("L", tuple((high - low) * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)

    def fill(points: np.ndarray, value: int) -> None:
        # Pillow counts pixels by their centres.
        pen.polygon(((points - low) * SUPERSAMPLING - 0.5).ravel().tolist(), fill=value)

    fill(centre + spokes, 255)
    if thing.shape == "ring":
        fill(centre + spokes * RING_HOLE, 0)
    mask = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255
    (left, top), (right, bottom) = low, high
    return mask, (slice(top, bottom), slice(left, right))


def _light(direction: float, height: int, width: int, levels: float) -> np.ndarray:
    """A ramp (h, w, 1) from +levels in the corner that faces the light to -levels in the opposite one."""
    x, y = np.cos(np.deg2rad(direction)), -np.sin(np.deg2rad(direction))
    scale = levels / (abs(x) + abs(y))
    rows = np.linspace(-scale * y, scale * y, height, dtype=np.float32)
    columns = np.linspace(-scale * x, scale * x, width, dtype=np.float32)
    return (rows[:, None] + columns)[..., None]


def draw(scene: Scene, side: int = 256) -> Image.Image:
    """The picture of a scene, side x side pixels of RGB, antialiased and softly lit; the same scene, the same bytes."""
    picture = np.float32(COLOURS[scene.background]) + _light(scene.light, side, side, BACKGROUND_LIGHT)
    for thing in scene.objects:
        mask, box = coverage(thing, side)
        paint = np.float32(COLOURS[thing.colour]) + _light(scene.light, *mask.shape, OBJECT_LIGHT)
        picture[box] += mask[..., None] * (paint - picture[box])
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def object_masks(scene: Scene, side: int = 256) -> np.ndarray:
    """Which pixels belong to each object: bool (n, side, side)."""
    masks = np.zeros((len(scene.objects), side, side), bool)
    for mask, thing in zip(masks, scene.objects):
        covered, box = coverage(thing, side)
        mask[box] = covered >= 0.5
    return masks


# Datasets -------------------------------------------------------------------------------------------------------------


def example(index: int, seed: int, split: str, pairs: float, size: int, crop: int | None) -> dict:
    """Picture number `index` of a seed: {"image": float32 (h, w, 3) in [-1, 1], "caption": text}.

    With `crop`, the picture is a window of so many pixels about a random point of a random object's box.
    """
    rng = Random(f"{seed}/{index}")
    scene = sample_scene(rng, split, pairs)
    picture = draw(scene, size)
    if crop is not None:
        thing = rng.choice(scene.objects)
        centre = (place + rng.uniform(-0.5, 0.5) * thing.span for place in (thing.x, thing.y))
        left, top = (min(max(round(place * size - crop / 2), 0), size - crop) for place in centre)
        picture = picture.crop((left, top, left + crop, top + crop))
    return {"image": np.asarray(picture, np.float32) / 127.5 - 1, "caption": caption(scene)}


class ShapesDataset(Dataset):
    """`n` captioned pictures: item i is the same for a seed whatever the order and the number of workers."""

    def __init__(self, n: int, seed: int = 0, split: str = "train", pairs: float = 0.5, size: int = 256,
                 crop: int | None = None):
        _check_options(split, size, crop)
        self.n = n
        self.example = partial(example, seed=seed, split=split, pairs=pairs, size=size, crop=crop)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.n:
            raise IndexError(f"index must be from 0 to {self.n - 1}, got {index}")
        return self.example(index)


class ShapesStream(IterableDataset):
    """Captioned pictures without end, from number `start` on; workers and ranks take turns, so none comes twice."""

    def __init__(self, seed: int = 0, split: str = "train", pairs: float = 0.5, size: int = 256,
                 crop: int | None = None, start: int = 0):
        _check_options(split, size, crop)
        self.start = start
        self.example = partial(example, seed=seed, split=split, pairs=pairs, size=size, crop=crop)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if dist.is_available() and dist.is_initialized():
            turn, workers = turn + dist.get_rank() * workers, workers * dist.get_world_size()
        return map(self.example, itertools.count(self.start + turn, workers))


def _check_options(split: str, size: int, crop: int | None) -> None:
    _check_word("split", split, SPLITS)
    if crop is not None and not 0 < crop <= size:
        raise RequestError(f"crop must be from 1 to the picture's {size} pixels, got {crop}")
