"""The shapes world: its words, its scenes, its pictures and the datasets made of them."""

from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.shapes import (
    COLOURS,
    MAX_ROTATION,
    PAIR_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Noun,
    ShapesDataset,
    ShapesStream,
    caption,
    draw,
    hard_negatives,
    held_out_triples,
    holds,
    object_masks,
    parse,
    sample_caption,
    sample_scene,
    scene_for,
)
from ldm.errors import RequestError
from ldm.util import instantiate_from_config

ONE = "a large red circle on a blue background"
TWO = "a red circle left of a blue square on a white background"


def scenes(n: int, split: str = "all"):
    return [sample_scene(Random(f"{split} {i}"), split) for i in range(n)]


def test_a_caption_of_one_object_is_read_word_by_word():
    assert parse(ONE) == Caption((Noun("red", "circle", "large"),), "blue")


def test_a_caption_of_two_objects_is_read_word_by_word():
    assert parse(TWO) == Caption((Noun("red", "circle"), Noun("blue", "square")), "white", "left of")


def test_every_caption_that_is_written_reads_back_as_itself():
    for scene in scenes(200):
        text = caption(scene)
        assert str(parse(text)) == text


def test_the_captions_of_the_pictures_in_the_readme_are_in_the_grammar():
    captions = (Path(__file__).parents[2] / "docs" / "captions.txt").read_text().splitlines()
    assert [str(parse(text)) for text in captions] == captions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no caption of the shapes world"),
        ("a photograph of an astronaut riding a horse", "no caption of the shapes world"),
        ("a red circle on a blue background", "no caption of the shapes world"),
        ("a large red circle on a blue background, oil painting", "no caption of the shapes world"),
        ("a red circle near a blue square on a white background", "no caption of the shapes world"),
        ("a large violet circle on a blue background", "no colour 'violet'"),
        ("a large red hexagon on a blue background", "no shape 'hexagon'"),
        ("a huge red circle on a blue background", "no size 'huge'"),
        ("a large red circle on a brown background", "no background 'brown'"),
        ("a large red circle on a red background", "must differ in colour"),
        ("a red circle left of a red square on a white background", "must differ in colour"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_reason(text, reason):
    with pytest.raises(RequestError, match=reason):
        parse(text)


@pytest.mark.parametrize(
    "parts",
    [
        ((Noun("red", "circle", "large"),), "blue", "above"),
        ((Noun("red", "circle"), Noun("green", "star")), "blue", None),
        ((Noun("red", "circle", "large"), Noun("green", "star")), "blue", "above"),
    ],
)
def test_a_caption_that_the_grammar_cannot_say_is_refused(parts):
    with pytest.raises(RequestError, match="one object with its size, or two"):
        Caption(*parts)


def test_a_tenth_of_all_triples_is_held_out_and_every_word_is_still_shown():
    assert len(held_out_triples()) == 88
    shown = [(colour, shape, ground) for colour in COLOURS for shape in SHAPES for ground in COLOURS
             if colour != ground and (colour, shape, ground) not in held_out_triples()]
    assert len(shown) == 880 - 88
    assert {triple[:2] for triple in shown} == {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert {(colour, ground) for colour, _, ground in shown} == {(a, b) for a in COLOURS for b in COLOURS if a != b}


def test_the_held_out_triples_are_the_same_on_every_machine():
    assert sorted(held_out_triples())[:3] == [
        ("black", "circle", "cyan"),
        ("black", "circle", "pink"),
        ("black", "cross", "green"),
    ]


def test_training_never_shows_a_held_out_triple_and_the_held_out_split_always_does():
    def triples(scene):
        return {(thing.colour, thing.shape, scene.background) for thing in scene.objects}

    assert not any(triples(scene) & held_out_triples() for scene in scenes(300, "train"))
    assert all(triples(scene) & held_out_triples() for scene in scenes(300, "held_out"))


def test_an_unknown_split_is_refused():
    with pytest.raises(RequestError, match="no split 'test'"):
        sample_scene(Random(0), "test")


@pytest.mark.parametrize(("pairs", "objects"), [(0.0, 1), (1.0, 2)])
def test_the_share_of_pairs_can_be_chosen(pairs, objects):
    assert {len(sample_caption(Random(i), pairs=pairs).objects) for i in range(20)} == {objects}


def test_objects_keep_to_their_sizes_and_rotation():
    for scene in scenes(300):
        for thing in scene.objects:
            low, high = SIZES[thing.size] if len(scene.objects) == 1 else PAIR_SIZE
            assert low <= thing.span <= high
            assert abs(thing.rotation) <= MAX_ROTATION


def test_objects_never_touch_each_other_or_the_edge():
    for scene in scenes(100):
        masks = object_masks(scene, 128)
        inner = np.zeros((128, 128), bool)
        inner[2:-2, 2:-2] = True
        assert not (masks & ~inner).any()
        for one, other in combinations(masks, 2):
            rows, columns = np.nonzero(one)
            other_rows, other_columns = np.nonzero(other)
            apart = np.maximum(rows.min() - other_rows.max(), other_rows.min() - rows.max())
            aside = np.maximum(columns.min() - other_columns.max(), other_columns.min() - columns.max())
            assert max(apart, aside) >= 4


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_holds_by_the_centres_and_no_other_does(relation):
    text = f"a red heart {relation} a green ring on a black background"
    for i in range(100):
        scene = scene_for(text, Random(i))
        assert caption(scene) == text
        assert [name for name in RELATIONS if holds(name, *scene.objects)] == [relation]


def test_the_same_scene_gives_the_same_bytes():
    assert draw(sample_scene(Random(3))).tobytes() == draw(sample_scene(Random(3))).tobytes()
    assert draw(sample_scene(Random(3))).tobytes() != draw(sample_scene(Random(4))).tobytes()


def test_the_background_is_its_colour_within_six_levels_and_not_flat():
    scene = scene_for(ONE, Random(0))
    pixels = np.asarray(draw(scene, 128), int)
    assert pixels.shape == (128, 128, 3)
    off = pixels[[0, 0, -1, -1], [0, -1, 0, -1]] - COLOURS["blue"]
    assert off.min() == -6
    assert off.max() == 6


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_painted_in_its_colour_with_soft_edges(shape):
    scene = scene_for(f"a large red {shape} on a blue background", Random(1))
    pixels = np.asarray(draw(scene), int)
    (mask,) = object_masks(scene)
    red = np.abs(pixels - COLOURS["red"]).max(axis=-1) <= 8
    blue = np.abs(pixels - COLOURS["blue"]).max(axis=-1) <= 6
    assert red[mask].mean() > 0.95
    assert blue[~mask].mean() > 0.98
    between = ~(red | blue)
    assert 0.001 < between.mean() < 0.02


def test_a_ring_has_a_hole_where_the_background_shows():
    scene = scene_for("a large red ring on a blue background", Random(0))
    ring = scene.objects[0]
    pixel = np.asarray(draw(scene), int)[int(ring.y * 256), int(ring.x * 256)]
    assert np.abs(pixel - COLOURS["blue"]).max() <= 6


@pytest.mark.parametrize("text", [ONE, TWO, "a white star above a black star on a pink background"])
def test_hard_negatives_are_other_captions_of_the_grammar(text):
    for i in range(30):
        negatives = hard_negatives(text, Random(i))
        assert len(negatives) >= 4
        assert len({text, *negatives}) == len(negatives) + 1
        assert not any(parse(negative).is_held_out for negative in negatives)


def test_hard_negatives_exchange_colours_turn_the_relation_and_replace_words():
    negatives = hard_negatives(TWO, Random(0), split="all")
    assert "a blue circle left of a red square on a white background" in negatives
    assert "a red square left of a blue circle on a white background" in negatives
    assert "a red circle right of a blue square on a white background" in negatives
    assert any(parse(negative).background != "white" for negative in negatives)


@pytest.mark.parametrize("size", [32, 64])
def test_a_dataset_gives_pictures_from_minus_one_to_one_with_their_captions(size):
    dataset = ShapesDataset(n=5, seed=1, size=size)
    items = list(dataset)
    assert len(items) == len(dataset) == 5
    for item in items:
        assert item["image"].shape == (size, size, 3)
        assert item["image"].dtype == np.float32
        assert -1 <= item["image"].min() < item["image"].max() <= 1
        assert str(parse(item["caption"])) == item["caption"]


def test_a_dataset_has_the_same_items_every_time_and_others_for_another_seed():
    first, again, other = (ShapesDataset(n=3, seed=seed, size=32)[2] for seed in (0, 0, 1))
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


def test_a_crop_is_a_window_that_meets_an_object():
    dataset = ShapesDataset(n=20, size=256, crop=64)
    assert {item["image"].shape for item in dataset} == {(64, 64, 3)}
    assert np.mean([np.ptp(item["image"]) > 0.3 for item in dataset]) > 0.7
    with pytest.raises(RequestError, match="crop must be"):
        ShapesDataset(n=1, size=32, crop=64)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_never_repeats_a_picture_whatever_the_number_of_workers(workers):
    batches = iter(DataLoader(ShapesStream(size=32), batch_size=4, num_workers=workers))
    images = torch.cat([next(batches)["image"] for _ in range(4)])
    want = torch.stack([torch.from_numpy(item["image"]) for item in ShapesDataset(n=16, size=32)])
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(want.flatten(1).sum(1).tolist())


def test_a_stream_goes_on_where_it_is_told_to():
    resumed = next(iter(ShapesStream(size=32, start=5)))
    assert np.array_equal(resumed["image"], ShapesDataset(n=6, size=32)[5]["image"])


def test_datasets_are_built_from_yaml():
    config = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": 7, "split": "held_out", "size": 32}}
    assert len(instantiate_from_config(config)) == 7


def test_the_base_of_iterable_datasets_keeps_its_records_and_asks_for_an_iterator():
    dataset = Txt2ImgIterableBaseDataset(num_records=3, valid_ids=[4, 5, 6])
    assert len(dataset) == 3
    assert dataset.sample_ids == [4, 5, 6]
    with pytest.raises(NotImplementedError, match="must define __iter__"):
        iter(dataset)
