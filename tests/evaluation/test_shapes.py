"""The exact score: right about drawings, even spoilt ones, and never right by luck."""

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ldm.data.shapes import (
    COLOURS,
    OPPOSITE,
    RELATIONS,
    RING_HOLE,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw,
    hard_negatives,
    object_masks,
    outline,
    sample_scene,
    scene_for,
)
from ldm.errors import ImageError, RequestError
from ldm.evaluation.shapes import Score, iou, read, score

LARGE = "a large red circle on a blue background"


def share_right(n: int, spoil=lambda picture: picture, side: int = 256) -> float:
    """The share of n fresh drawings whose caption is found right after `spoil`."""
    scenes = [sample_scene(Random(f"fresh {i}"), "all") for i in range(n)]
    return float(np.mean([score(spoil(draw(scene, side)), caption(scene)).right for scene in scenes]))


def painted(*outlines, colour="red", ground="blue") -> Image.Image:
    """An outline (n, 2) about the origin, and perhaps that of a hole in it, on a 256-pixel picture."""
    picture = Image.new("RGB", (1024, 1024), COLOURS[ground])
    for points, fill in zip(outlines, (COLOURS[colour], COLOURS[ground])):
        ImageDraw.Draw(picture).polygon((points * 400 + 512).ravel().tolist(), fill=fill)
    return picture.reduce(4)


def turned(points: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def test_a_thousand_fresh_drawings_are_read_right():
    assert share_right(1000) >= 0.995


def test_blur_and_noise_do_not_mislead():
    rng = np.random.default_rng(0)

    def spoil(picture):
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), float)
        return np.clip(np.rint(blurred + rng.normal(0, 4, blurred.shape)), 0, 255).astype(np.uint8)

    assert share_right(200, spoil) >= 0.99


@pytest.mark.parametrize("method", ["dwtDct", "dwtDctSvd"])
def test_the_watermark_does_not_mislead(method):
    from imwatermark import WatermarkEncoder

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", b"StableDiffusionV1")

    def mark(picture):
        return np.ascontiguousarray(encoder.encode(np.asarray(picture)[..., ::-1].copy(), method)[..., ::-1])

    assert share_right(20, mark) == 1


@pytest.mark.parametrize("side", [128, 512])
def test_pictures_of_another_size_are_read_too(side):
    assert share_right(20, side=side) == 1


def test_places_spans_and_masks_agree_with_the_scene():
    for i in range(40):
        scene = sample_scene(Random(i), "all")
        reading = read(draw(scene))
        for thing, mask in zip(scene.objects, object_masks(scene, 128)):
            (seen,) = [seen for seen in reading.objects if seen.colour == thing.colour]
            assert (seen.x, seen.y) == pytest.approx((thing.x, thing.y), abs=1 / 256)
            assert seen.span == pytest.approx(thing.span, abs=0.005)
            assert iou(seen.mask, mask) > 0.95


def test_a_hard_negative_is_never_right():
    for i in range(30):
        scene = sample_scene(Random(i), "all")
        reading = read(draw(scene))
        for negative in hard_negatives(caption(scene), Random(i), split="all"):
            assert not score(reading, negative).right, f"{caption(scene)} was read as {negative}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (LARGE, set()),
        ("a large red circle on a green background", {"background"}),
        ("a large pink circle on a blue background", {"colour"}),
        ("a large red heart on a blue background", {"shape"}),
        ("a small red circle on a blue background", {"size"}),
        ("a red circle above a white star on a blue background", {"count", "colour", "shape", "size", "relation"}),
    ],
)
def test_the_score_names_what_is_wrong(text, wrong):
    got = score(draw(scene_for(LARGE, Random(0))), text)
    assert {name for name, right in vars(got).items() if not right} == wrong
    assert got.right == (not wrong)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a red circle left of a white star on a blue background", set()),
        ("a white star right of a red circle on a blue background", set()),
        ("a red circle right of a white star on a blue background", {"relation"}),
        ("a red circle above a white star on a blue background", {"relation"}),
        ("a white circle left of a red star on a blue background", {"shape", "relation"}),
        ("a large red circle on a blue background", {"count", "size"}),
    ],
)
def test_the_score_of_two_objects_names_what_is_wrong(text, wrong):
    got = score(draw(scene_for("a red circle left of a white star on a blue background", Random(0))), text)
    assert {name for name, right in vars(got).items() if not right} == wrong


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_relation_of_two_objects_is_read(relation):
    picture = draw(scene_for(f"a red square {relation} a black diamond on a cyan background", Random(1)))
    reading = read(picture)
    expected = relation if reading.objects[0].colour == "red" else OPPOSITE[relation]
    assert reading.relation() == expected
    assert read(draw(scene_for(LARGE, Random(0)))).relation() is None


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_recognised_as_itself(shape):
    outlines = [outline(shape), outline(shape) * RING_HOLE] if shape == "ring" else [outline(shape)]
    (seen,) = read(painted(*outlines)).objects
    assert seen.shape == shape


CIRCLE = outline("circle")
ARC = CIRCLE[8:120]
POTATO = CIRCLE * (1 + 0.2 * np.sin(5 * np.linspace(0, 2 * np.pi, 128, endpoint=False)))[:, None]


@pytest.mark.parametrize(
    "outlines",
    [
        pytest.param([CIRCLE * [1, 0.75]], id="an ellipse"),
        pytest.param([POTATO], id="a potato"),
        pytest.param([CIRCLE[::21]], id="a hexagon"),
        pytest.param([outline("square") * [1, 0.75]], id="a rectangle"),
        pytest.param([turned(outline("square"), 45)], id="a square on its corner"),
        pytest.param([outline("triangle") * [1, -1]], id="a triangle that points down"),
        pytest.param([outline("heart") * [1, -1]], id="a heart upside down"),
        pytest.param([turned(outline("cross"), 45)], id="an x"),
        pytest.param([CIRCLE, CIRCLE * 0.25], id="a circle with a hole"),
        pytest.param([CIRCLE, CIRCLE * 0.8], id="a thin ring"),
        pytest.param([np.concatenate([ARC, ARC[::-1] * RING_HOLE])], id="an open ring"),
    ],
)
def test_what_is_not_clearly_one_of_the_shapes_has_no_shape(outlines):
    (seen,) = read(painted(*outlines)).objects
    assert seen.colour == "red"
    assert seen.shape is None


def test_something_more_than_the_caption_names_makes_the_count_wrong():
    picture = draw(scene_for(LARGE, Random(0)))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((4, 4, 24, 24), fill=COLOURS["yellow"])
    assert not score(picture, LARGE).count
    pen.rectangle((4, 4, 36, 36), fill=(120, 80, 40))  # a colour that is none of the palette's
    assert not score(picture, LARGE).count


def test_an_object_of_two_colours_is_not_right():
    picture = draw(scene_for(LARGE, Random(0)))
    pixels = np.array(picture)
    (mask,) = object_masks(scene_for(LARGE, Random(0)))
    mask[: int(np.nonzero(mask)[0].mean())] = False
    pixels[mask] = COLOURS["yellow"]
    assert not score(pixels, LARGE).right


def test_objects_that_touch_are_still_two():
    things = (Thing("red", "circle", None, 0.35, 0.5, 0.3, 0), Thing("white", "square", None, 0.65, 0.5, 0.3, 0))
    scene = Scene("blue", things, "left of", 0.0)
    assert score(draw(scene), caption(scene)).right


@pytest.mark.parametrize("kind", ["noise", "flat", "brown", "stripes"])
def test_a_picture_of_nothing_has_nothing_right(kind):
    pixels = {
        "noise": np.random.default_rng(0).integers(0, 256, (256, 256, 3)),
        "flat": np.full((256, 256, 3), COLOURS["white"]),
        "brown": np.full((256, 256, 3), (120, 80, 40)),
        "stripes": np.full((256, 256, 3), 20) + 220 * (np.arange(256) // 16 % 2)[:, None, None],
    }[kind].astype(np.uint8)
    assert score(pixels, LARGE) == Score(False, False, False, False, False, True)


def test_a_picture_that_is_not_square_is_refused():
    with pytest.raises(ImageError, match="is square, got 64x32"):
        read(Image.new("RGB", (64, 32)))


def test_a_caption_outside_the_grammar_is_refused():
    with pytest.raises(RequestError, match="no caption of the shapes world"):
        score(Image.new("RGB", (64, 64)), "an oil painting")


def test_iou_is_the_shared_part_of_two_masks():
    left, top = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2] = top[:2] = True
    assert iou(left, top) == pytest.approx(4 / 12)
    assert iou(left, left) == 1
    assert iou(left, ~left) == 0
