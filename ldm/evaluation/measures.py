"""What is measured of a model: each measure has drawn what it needs, and gives a table.

`draw(name, requests)` gives the file of each request, in order; `name` is a folder of its own for each list.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data import shapes
from ldm.errors import RequestError
from ldm.evaluation.clip_score import Clip
from ldm.evaluation.fid import Features, Statistics, frechet_distance, read_folder, statistics
from ldm.evaluation.options import SHAPES, Way
from ldm.evaluation.shapes import Reading, iou, read, score
from ldm.generation.request import Request, read_text
from ldm.image.io import read_image, write_png

Draw = Callable[[str, Sequence[Request]], list[Path]]
PARTS = ("background", "count", "colour", "shape", "size", "relation")
KEPT_IOU = 0.8
# Of the exact score: what each set of captions is called, from which split it is drawn, and how many name two objects.
SETS = {
    "seen": ("one object, its triple seen", "train", 0.0),
    "unseen": ("one object, its triple never shown", "held_out", 0.0),
    "two": ("two objects", "all", 1.0),
}


@dataclass(frozen=True)
class Table:
    """A row for each setting, {column: value}, and the facts that all of them share."""

    name: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any]


class Captions(NamedTuple):
    """Texts, and where they are from."""

    texts: list[str]
    source: str


def read_captions(source: str, n: int, seed: int) -> Captions:
    """The first n lines of a text file, or n captions of the shapes world. Raises RequestError for a file without any.

    Those of a seed are the same whatever n is.
    """
    if source == SHAPES:
        texts = [str(shapes.sample_caption(Random(f"{seed}/captions/{i}"), "all")) for i in range(n)]
        return Captions(texts, f"the shapes world, all triples, half of them pairs, seed {seed}")
    texts = [line.strip() for line in read_text(source).splitlines() if line.strip()][:n]
    if not texts:
        raise RequestError(f"{source} has no captions in it; write one on each line")
    return Captions(texts, source)


def read_reference(source: str, features: Features, n: int, seed: int, side: int) -> Statistics:
    """What drawn pictures are compared with: n fresh scenes, the pictures of a folder, or statistics in an .npz."""
    if source == SHAPES:
        scenes = (shapes.sample_scene(Random(f"{seed}/reference/{i}"), "all") for i in range(n))
        what = f"the shapes world, all triples, half of them pairs, seed {seed}, {side}x{side}"
        return statistics((shapes.draw(scene, side) for scene in scenes), features, what)
    if Path(source).is_dir():
        return statistics(read_folder(Path(source)), features, source)
    return Statistics.load(source)


def curve(
    draw: Draw, captions: Captions, scales: Sequence[float], way: Way, seed: int, clip: Clip, features: Features,
    reference: Statistics,
) -> Table:
    """Fréchet distance against CLIP score over guidance scales, as in the original's figure.

    The column of the distance is named for its features: fid is on Inception, frechet_clip on those of CLIP.
    """
    distance = {"inception": "fid"}.get(features.name, f"frechet_{features.name}")
    rows = []
    for scale in scales:
        requests = [request(text, way, scale, seed) for text in captions.texts]
        paths = draw(f"curve/{way.sampler}-{way.steps}/scale-{scale:g}", requests)
        found = statistics(map(read_image, paths), features, f"scale {scale:g}")
        rows.append({
            "scale": scale, "n": len(paths),
            "clip_score": round(float(clip.score(map(read_image, paths), captions.texts).mean()), 4),
            distance: round(frechet_distance(found, reference), 4),
        })  # fmt: skip
    return Table("curve", rows, {
        "sampler": str(way), "seed": seed, "captions": captions.source, "n": len(captions.texts),
        "clip_score": {"clip": clip.identity, "resize": clip.resize, "is": "mean cosine of picture and caption"},
        distance: {"features": features.identity, "resize": features.resize},
        "reference": {"source": reference.source, "n": reference.n},
    })  # fmt: skip


def exact(draw: Draw, n: int, ways: Sequence[Way], scale: float, seed: int) -> Table:
    """The exact score of the shapes world: n captions of each set, drawn in each way; all but n in per cent.

    The facts list each picture that is wrong, and in what.
    """
    rows, wrong = [], []
    for way, (name, (label, split, pairs)) in product(ways, SETS.items()):
        captions = [shapes.sample_caption(Random(f"{seed}/{name}/{i}"), split, pairs) for i in range(n)]
        paths = draw(f"exact/{way.sampler}-{way.steps}/scale-{scale:g}/{name}",
                     [request(str(caption), way, scale, seed) for caption in captions])
        found = [(caption, score(read_image(path), caption)) for caption, path in zip(captions, paths)]
        wrong += [
            {"file": str(path), "caption": str(caption), "wrong": [part for part in PARTS if not getattr(one, part)]}
            for path, (caption, one) in zip(paths, found) if not one.right
        ]  # fmt: skip
        groups = {label: found}
        if name == "two":
            groups[f"{label}, their triples seen"] = [one for one in found if not one[0].is_held_out]
            groups[f"{label}, a triple never shown"] = [one for one in found if one[0].is_held_out]
        for group, members in groups.items():
            rows.append({
                "sampler": str(way), "captions": group, "n": len(members),
                "right": per_cent(one.right for _, one in members),
                **{part: per_cent(getattr(one, part) for _, one in members) for part in PARTS},
            })  # fmt: skip
    return Table("exact", rows, {"scale": scale, "seed": seed, "n": n, "wrong": wrong})


def autoencoder(round_trip: Callable[[Image.Image], Image.Image], n: int, side: int, seed: int) -> Table:
    """What is left of fresh scenes that were encoded and decoded: PSNR in dB, and the exact score in per cent.

    PSNR is 10 log10(255² / mean squared error of the 8-bit pixels), averaged over pictures.
    """
    psnr, right = [], []
    for i in range(n):
        scene = shapes.sample_scene(Random(f"{seed}/autoencoder/{i}"), "all")
        picture = shapes.draw(scene, side)
        again = round_trip(picture)
        error = np.square(np.subtract(picture, again, dtype=np.float64)).mean()
        psnr.append(10 * np.log10(255**2 / max(error, 1e-10)))
        right.append(score(again, shapes.caption(scene)).right)
    row = {"n": n, "psnr": round(float(np.mean(psnr)), 2), "worst_psnr": round(float(np.min(psnr)), 2),
           "right": per_cent(right)}
    return Table("autoencoder", [row], {"seed": seed})


def img2img(draw: Draw, n: int, side: int, outdir: Path, way: Way, scale: float, seed: int) -> Table:
    """How far pictures of one object stay as they are at strength 0.3, and whether the prompt rules at 1; in per cent.

    kept: an object of the colour of the input's covers its place, with an IoU of 0.8 at least. right: the exact score
    of the prompt, which is the input's own caption or that of another scene.
    """
    def scenes(kind: str) -> list[shapes.Scene]:
        return [shapes.sample_scene(Random(f"{seed}/{kind}/{i}"), "all", pairs=0.0) for i in range(n)]

    inputs, others = scenes("img2img"), scenes("img2img, another")
    files = [write_input(outdir / f"img2img/inputs-{seed}/{i:05}.png", shapes.draw(scene, side))
             for i, scene in enumerate(inputs)]
    rows = []
    for strength, prompt, told in ((0.3, "own", inputs), (0.3, "another", others), (1.0, "another", others)):
        requests = [
            replace(request(shapes.caption(scene), way, scale, seed), init_img=str(file), strength=strength)
            for file, scene in zip(files, told)
        ]
        name = f"img2img/{way.sampler}-{way.steps}/scale-{scale:g}/strength-{strength:g}-{prompt}"
        readings = [read(read_image(path)) for path in draw(name, requests)]
        kept = [overlap(reading, scene) for reading, scene in zip(readings, inputs)]
        rows.append({
            "strength": strength, "prompt": prompt, "n": n,
            "kept": per_cent(found >= KEPT_IOU and colour for found, colour in kept),
            "iou": round(float(np.mean([found for found, _ in kept])), 3),
            "colour": per_cent(colour for _, colour in kept),
            "right": per_cent(score(reading, shapes.caption(scene)).right for reading, scene in zip(readings, told)),
        })  # fmt: skip
    return Table("img2img", rows, {"sampler": str(way), "scale": scale, "seed": seed})


def inpaint(draw: Draw, n: int, side: int, outdir: Path, way: Way, scale: float, seed: int) -> Table:
    """Whether an object that is asked for appears in a masked area, and the rest stays as it is; in per cent.

    Of scenes of two objects one is left out, all beside the other one is masked, and the prompt names both.
    appears: an object of that colour and shape has its centre in the mask. right: the exact score of the whole.
    unchanged: every pixel outside the mask is as it was.
    """
    requests, inputs = [], []
    for i in range(n):
        rng = Random(f"{seed}/inpaint/{i}")
        scene = shapes.sample_scene(rng, "all", pairs=1.0)
        wanted = rng.randrange(2)
        picture = shapes.draw(replace(scene, objects=(scene.objects[1 - wanted],)), side)
        mask = beside(scene, wanted, side)
        files = (write_input(outdir / f"inpaint/inputs-{seed}/{i:05}{suffix}.png", image)
                 for suffix, image in (("", picture), ("_mask", Image.fromarray(np.uint8(255 * mask)))))
        init_img, mask_file = map(str, files)
        requests.append(replace(request(shapes.caption(scene), way, scale, seed), init_img=init_img, mask=mask_file))
        inputs.append((scene, wanted, np.asarray(picture), mask))
    paths = draw(f"inpaint/{way.sampler}-{way.steps}/scale-{scale:g}", requests)
    appears, right, unchanged = [], [], []
    for path, (scene, wanted, before, mask) in zip(paths, inputs):
        after = np.asarray(read_image(path))
        reading, thing = read(after), scene.objects[wanted]
        appears.append(any(
            (seen.colour, seen.shape) == (thing.colour, thing.shape)
            and mask[int(seen.y * (len(mask) - 1)), int(seen.x * (len(mask) - 1))] for seen in reading.objects
        ))
        right.append(score(reading, shapes.caption(scene)).right)
        unchanged.append(np.array_equal(after[~mask], before[~mask]))
    row = {"n": n, "appears": per_cent(appears), "right": per_cent(right), "unchanged": per_cent(unchanged)}
    return Table("inpaint", [row], {"sampler": str(way), "scale": scale, "seed": seed})


def request(text: str, way: Way, scale: float, seed: int) -> Request:
    return Request(prompt=text, sampler=way.sampler, steps=way.steps, scale=scale, seed=seed)


def per_cent(answers: Iterable[bool]) -> float | None:
    """How many are true; None of none."""
    answers = list(answers)
    return round(100 * sum(map(bool, answers)) / len(answers), 1) if answers else None


def overlap(reading: Reading, scene: shapes.Scene) -> tuple[float, bool]:
    """The best IoU that an object in a picture has with the one of a scene, and whether it is of that one's colour."""
    (mask,) = shapes.object_masks(scene, 128)
    candidates = ((iou(seen.mask, mask), seen.colour == scene.objects[0].colour) for seen in reading.objects)
    return max(candidates, default=(0.0, False))


def beside(scene: shapes.Scene, wanted: int, side: int) -> np.ndarray:
    """The part of a picture in which one object of two may stand: all on its side of the other, bool (side, side)."""
    axis, sign = shapes.RELATIONS[scene.relation]
    first = (wanted == 0) == (sign > 0)  # whether it is the one nearer to the left or upper edge
    other = shapes.object_masks(scene, side)[1 - wanted]
    taken = np.flatnonzero(other.any(axis=axis))
    gap = round(shapes.GAP / 2 * side)
    strip = np.zeros(side, bool)
    strip[slice(0, taken[0] - gap) if first else slice(taken[-1] + 1 + gap, side)] = True
    return np.broadcast_to(strip[None] if axis == 0 else strip[:, None], (side, side))


def write_input(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_png(path, image, overwrite=True)
