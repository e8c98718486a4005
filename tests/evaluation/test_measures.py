"""Each measure on pictures whose answer is known: those that the shapes world itself draws."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_clip

from ldm.data import shapes
from ldm.errors import RequestError
from ldm.evaluation import measures
from ldm.evaluation.clip_score import Clip
from ldm.evaluation.measures import Captions, Table
from ldm.evaluation.options import SHAPES, EvaluationOptions, Way
from ldm.evaluation.report import lines, write
from ldm.generation.request import Request
from ldm.image.io import read_image

SIDE = 128
DDIM = Way("ddim", 50)


class Painter:
    """Draws what `paint` makes of each request, and remembers the requests."""

    def __init__(self, folder: Path, paint):
        self.folder, self.paint, self.asked = folder, paint, {}

    def __call__(self, name: str, requests: list[Request]) -> list[Path]:
        self.asked[name] = requests
        paths = [self.folder / name / f"{index}.png" for index in range(len(requests))]
        (self.folder / name).mkdir(parents=True)
        for path, request in zip(paths, requests):
            self.paint(request).save(path)
        return paths


def as_asked(request: Request) -> Image.Image:
    return shapes.draw(shapes.scene_for(request.prompt, Random(0)), SIDE)


def as_given(request: Request) -> Image.Image:
    return read_image(request.init_img)


def test_the_exact_score_is_told_by_set_and_sampler_with_what_is_wrong(tmp_path):
    def paint(request: Request) -> Image.Image:
        caption = shapes.parse(request.prompt)
        if request.sampler == "ddim" and len(caption.objects) == 2:
            caption = replace(caption, relation=shapes.OPPOSITE[caption.relation])
        return as_asked(replace(request, prompt=str(caption)))

    painter = Painter(tmp_path, paint)
    table = measures.exact(painter, 4, [Way("plms", 50), DDIM], 7.5, seed=1)
    assert [(row["sampler"], row["n"]) for row in table.rows[:3]] == [("plms:50", 4)] * 3
    assert len({row["captions"] for row in table.rows}) == 5
    right = {(row["sampler"], row["captions"]): row["right"] for row in table.rows if row["n"]}
    assert {value for (sampler, _), value in right.items() if sampler == "plms:50"} == {100.0}
    assert {value for (_, captions), value in right.items() if "one" in captions} == {100.0}
    assert right["ddim:50", "two objects"] == 0.0
    assert [one["wrong"] for one in table.facts["wrong"]] == [["relation"]] * 4
    for name, requests in painter.asked.items():
        assert {(one.scale, one.seed) for one in requests} == {(7.5, 1)}
        captions = [shapes.parse(one.prompt) for one in requests]
        assert [len(one.objects) for one in captions] == [2 if name.endswith("two") else 1] * 4
        if not name.endswith("two"):
            assert {one.is_held_out for one in captions} == {name.endswith("unseen")}
    splits = [row["n"] for row in table.rows if row["captions"].startswith("two objects,")]
    assert sum(splits) == 8


@pytest.mark.parametrize(("change", "psnr"), [(0, 148.13), (5, 34.15)])
def test_the_autoencoder_is_told_by_the_error_that_it_leaves(change, psnr):
    def round_trip(picture: Image.Image) -> Image.Image:
        return Image.fromarray(np.asarray(picture) - np.uint8(change))

    (row,) = measures.autoencoder(round_trip, 3, SIDE, seed=0).rows
    assert row == {"n": 3, "psnr": psnr, "worst_psnr": psnr, "right": 100.0}


def test_img2img_tells_what_is_kept_and_what_the_prompt_rules(tmp_path):
    painter = Painter(tmp_path / "drawn", lambda request: (as_given if request.strength < 1 else as_asked)(request))
    table = measures.img2img(painter, 3, SIDE, tmp_path, DDIM, 5.0, seed=0)
    own, another, whole = table.rows
    assert [row["strength"] for row in table.rows] == [0.3, 0.3, 1.0]
    assert own["kept"] == another["kept"] == own["right"] == whole["right"] == 100.0
    assert own["iou"] > 0.95
    assert another["right"] == whole["kept"] == 0.0


def test_what_moves_is_not_kept(tmp_path):
    def paint(request: Request) -> Image.Image:
        return Image.fromarray(np.roll(np.asarray(as_given(request)), 12, axis=1))

    own, *_ = measures.img2img(Painter(tmp_path / "drawn", paint), 3, SIDE, tmp_path, DDIM, 5.0, seed=0).rows
    assert own["kept"] == 0.0
    assert own["colour"] > 50


def test_inpainting_tells_what_appears_where_it_is_asked_for(tmp_path):
    untouched = measures.inpaint(Painter(tmp_path / "a", as_given), 3, SIDE, tmp_path, DDIM, 7.5, seed=0)
    assert untouched.rows == [{"n": 3, "appears": 0.0, "right": 0.0, "unchanged": 100.0}]

    def paint(request: Request) -> Image.Image:
        scene = shapes.sample_scene(Random(f"0/inpaint/{Path(request.init_img).stem.lstrip('0') or 0}"), "all", 1.0)
        assert shapes.caption(scene) == request.prompt
        return shapes.draw(scene, SIDE)

    assert measures.inpaint(Painter(tmp_path / "b", paint), 3, SIDE, tmp_path, DDIM, 7.5, seed=0).rows == [
        {"n": 3, "appears": 100.0, "right": 100.0, "unchanged": 100.0}]  # fmt: skip
    other = measures.inpaint(Painter(tmp_path / "c", as_asked), 3, SIDE, tmp_path, DDIM, 7.5, seed=0)
    assert other.rows[0]["right"] == 100.0
    assert other.rows[0]["unchanged"] < 100


def test_the_area_beside_an_object_holds_the_other_one_and_nothing_of_it():
    for seed in range(20):
        scene = shapes.sample_scene(Random(seed), "all", pairs=1.0)
        for wanted in (0, 1):
            mask, objects = measures.beside(scene, wanted, SIDE), shapes.object_masks(scene, SIDE)
            assert mask.shape == (SIDE, SIDE)
            assert mask[objects[wanted]].all()
            assert not mask[objects[1 - wanted]].any()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Clip.load(write_clip(tmp_path_factory.mktemp("clip")), torch.device("cpu"))


@pytest.fixture
def curve(clip, tmp_path, caplog):
    """The curve of a painter who draws what is asked for up to scale 3, and grey above."""
    def paint(request: Request) -> Image.Image:
        return as_asked(request) if request.scale <= 3 else Image.new("RGB", (SIDE, SIDE), "gray")

    captions = measures.read_captions(SHAPES, 12, seed=0)
    pictures = [as_asked(Request(prompt=text)) for text in captions.texts]
    reference = measures.statistics(pictures, clip, "the same pictures")
    painter = Painter(tmp_path / "drawn", paint)
    table = measures.curve(painter, captions, [1.5, 3.0, 8.0], Way("plms", 50), 42, clip, clip, reference)
    return table, clip.score(pictures, captions.texts).mean()


def test_the_curve_has_a_row_for_each_scale_and_names_what_its_distance_is_taken_on(curve, clip):
    table, score = curve
    assert [list(row) for row in table.rows] == [["scale", "n", "clip_score", "frechet_clip"]] * 3
    assert [row["frechet_clip"] for row in table.rows[:2]] == pytest.approx([0, 0], abs=1e-3)
    assert table.rows[2]["frechet_clip"] > 0.01
    assert table.rows[0]["clip_score"] == pytest.approx(score, abs=1e-4)
    assert table.facts["frechet_clip"] == {"features": clip.identity, "resize": clip.resize}
    assert table.facts["reference"] == {"source": "the same pictures", "n": 12}


def test_a_table_is_written_as_csv_json_and_the_curve_as_a_plot(curve, tmp_path):
    table, _ = curve
    paths = write(table, tmp_path)
    assert [path.name for path in paths] == ["curve.csv", "curve.json", "curve.png"]
    with open(paths[0], encoding="utf-8", newline="") as file:
        assert [float(row["scale"]) for row in csv.DictReader(file)] == [1.5, 3, 8]
    found = json.loads(paths[1].read_text())
    assert found["rows"] == table.rows
    assert {"sampler", "seed", "captions", "n", "clip_score", "reference"} <= found.keys()
    assert read_image(paths[2]).size == (500, 360)


def test_a_table_is_shown_in_columns():
    rows = [{"set": "one", "n": 4, "right": 100.0}, {"set": "two", "n": 0, "right": None}]
    assert list(lines(Table("exact", rows, {}))) == ["set  n  right", "one  4  100", "two  0  -"]


def test_captions_are_the_lines_of_a_file_or_the_same_for_a_seed_whatever_their_number(tmp_path):
    (tmp_path / "captions.txt").write_text("a fox\n\n  a red bench \na castle\n")
    found = measures.read_captions(str(tmp_path / "captions.txt"), 2, seed=0)
    assert found == Captions(["a fox", "a red bench"], str(tmp_path / "captions.txt"))
    few, many = (measures.read_captions(SHAPES, n, seed=3).texts for n in (5, 9))
    assert many[:5] == few != measures.read_captions(SHAPES, 5, seed=4).texts
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(RequestError, match="no captions in it"):
        measures.read_captions(str(tmp_path / "empty.txt"), 2, seed=0)


@pytest.mark.parametrize(("given", "message"), [
    ({"samplers": ("plms",)}, "such as plms:50, got 'plms'"),
    ({"samplers": ("plmz:50",)}, "sampler must be one of"),
    ({"samplers": ("plms:0",)}, "steps must be from 1"),
    ({"n": 1}, "n must be from 2"),
    ({"features": "vgg"}, "features must be one of"),
    ({"captions": "coco.txt"}, "--reference"),
])
def test_an_evaluation_that_cannot_be_carried_out_says_why(given, message):
    with pytest.raises(RequestError, match=message):
        EvaluationOptions(**given)
