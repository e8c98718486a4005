"""txt2img.py on a model of pictures with depth: both files, in every account of them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

SMALL = ("--device", "cpu", "--precision", "full", "--ddim_steps", 2, "--n_iter", 1, "--watermark", "off", "--safety",
         "off", "--prompt", "a fox", "--sampler", "ddim")


@pytest.fixture
def txt2img(script, models):
    return lambda *options: script("txt2img", "--ckpt", models["rgbd"], *SMALL, *options)


def opened(path):
    with Image.open(path) as image:
        image.load()
    return image


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_picture_has_its_depth_beside_it_and_both_are_in_the_manifest(txt2img, tmp_path):
    done = txt2img("--n_samples", 2, "--outdir", "out", "--preview", 1)
    assert done.code == 0
    assert done.out == [f"out/samples/0000{number}{kind}.png" for number in (0, 1) for kind in ("", "_depth")] + [
        "out/grid-0000.png"]
    samples = tmp_path / "out" / "samples"
    for number in (0, 1):
        picture, depth = opened(samples / f"0000{number}.png"), opened(samples / f"0000{number}_depth.png")
        assert (picture.mode, depth.mode, depth.size) == ("RGB", "I;16", picture.size)
        assert depth.info["ldm"] == picture.info["ldm"]
    assert len(np.unique(np.asarray(depth))) > 256
    entries = [line for line in lines(tmp_path / "out" / "manifest.jsonl") if "sha256" in line and "grid" not in line]
    assert [entry["depth"] for entry in entries] == ["00000_depth.png", "00001_depth.png"]
    assert all(re.fullmatch("[0-9a-f]{64}", entry["depth_sha256"]) for entry in entries)


def test_a_depth_that_is_missing_or_altered_is_made_again_by_resume(txt2img, tmp_path):
    assert txt2img("--n_samples", 2, "--outdir", "out").code == 0
    files = sorted((tmp_path / "out" / "samples").iterdir())
    before = {file: file.read_bytes() for file in files}
    files[1].unlink()
    files[3].write_bytes(b"altered")
    assert txt2img("--n_samples", 2, "--outdir", "out", "--resume").code == 0
    assert {file: file.read_bytes() for file in sorted((tmp_path / "out" / "samples").iterdir())} == before


@pytest.mark.parametrize("name", ["00000.png", "00000_depth.png"])
def test_either_file_is_replayed_as_the_pair(txt2img, tmp_path, name):
    assert txt2img("--n_samples", 1, "--outdir", "out").code == 0
    assert txt2img("--outdir", "again", "--replay", f"out/samples/{name}").code == 0
    for file in (tmp_path / "out" / "samples").iterdir():
        assert (tmp_path / "again" / "samples" / file.name).read_bytes() == file.read_bytes()


def test_events_tell_of_the_depth(txt2img):
    done = txt2img("--n_samples", 1, "--outdir", "out", "--json")
    saved = [event for event in map(json.loads, done.out) if event["event"] == "saved"]
    assert [event["kind"] for event in saved] == ["picture", "depth", "grid"]


def test_a_picture_to_start_from_is_refused_with_the_script_that_draws(script, models, photo):
    done = script("img2img", "--ckpt", models["rgbd"], *SMALL, "--init-img", photo)
    assert done.code == 2
    assert "depth" in done.said and "scripts/txt2img.py" in done.said


@pytest.fixture
def enlarge(script, models, photo):
    """Run upscale.py on a picture of 64x64 pixels and its depth."""
    Image.fromarray(np.arange(64**2, dtype=np.uint16).reshape(64, 64) * 16).save("depth.png")

    def run(*options: object):
        pair = ("--ckpt", models["rgbd-x2"], "--init-img", photo, "--scale_factor", 2)
        return script("upscale", *pair, *SMALL, *options)

    return run


def test_a_picture_and_its_depth_are_enlarged_together(enlarge):
    Image.fromarray(65535 - np.array(opened("depth.png"))).save("other.png")
    done, other = (enlarge("--depth-img", name, "--outdir", name[:-4]) for name in ("depth.png", "other.png"))
    assert done.out == ["depth/samples/00000.png", "depth/samples/00000_depth.png", "depth/grid-0000.png"]
    sizes = [(opened(path).mode, opened(path).size) for path in done.out[:2]]
    assert sizes == [("RGB", (128, 128)), ("I;16", (128, 128))]
    assert opened(done.out[0]).tobytes() != opened(other.out[0]).tobytes()
    again = enlarge("--depth-img", "depth.png", "--outdir", "depth", "--resume")
    assert again.out[-1:] == ["depth/grid-0000.png"]
    assert len(again.out) == 1


@pytest.mark.parametrize(("options", "words"), [
    ((), ["--depth-img"]),
    (("--depth-img", "nowhere.png"), ["there is no picture at nowhere.png"]),
    (("--depth-img", "photo.png"), ["grey", "RGB"]),
    (("--depth-img", "depth.png", "--scale_factor", 4), ["2 times", "--scale_factor 2"]),
    (("--depth-img", "depth.png", "--noise_level", 3), ["leave --noise_level out"]),
])
def test_a_pair_that_cannot_be_enlarged_is_one_line_that_says_what_to_do(enlarge, options, words):
    done = enlarge(*options)
    assert done.code == 2
    assert all(word in done.said for word in words)


def test_a_depth_map_of_another_size_is_refused(enlarge):
    opened("depth.png").resize((32, 64)).save("narrow.png")
    assert "must have the size of" in enlarge("--depth-img", "narrow.png").said
