"""The CLIP score against transformers on the same weights, and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_clip
from transformers import CLIPModel

from ldm.errors import ConfigError
from ldm.evaluation.clip_score import Clip
from ldm.modules.encoders.clip import CLIP_MEAN, CLIP_STD

CAPTIONS = ["a fox in the snow", "a red bench", "a fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.load(folder, torch.device("cpu"))


def pictures(n: int, size=(32, 32)) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


@torch.no_grad()
def test_the_score_is_the_cosine_that_transformers_gives(folder, clip):
    theirs = CLIPModel.from_pretrained(folder).eval()
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures(3)])
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    ids = clip.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    out = theirs(input_ids=ids, pixel_values=pixels)
    expected = (out.image_embeds * out.text_embeds).sum(dim=-1)
    np.testing.assert_allclose(clip.score(iter(pictures(3)), CAPTIONS), expected, atol=1e-5)
    assert expected.std() > 0.01


def test_each_picture_is_held_against_its_own_caption_over_batches(clip, monkeypatch):
    whole = clip.score(pictures(3), CAPTIONS)
    monkeypatch.setattr("ldm.evaluation.clip_score.BATCH", 2)
    np.testing.assert_allclose(clip.score(pictures(3), CAPTIONS), whole, atol=1e-6)
    assert clip.score(pictures(3)[1:2], CAPTIONS[1:2])[0] == pytest.approx(whole[1], abs=1e-6)
    with pytest.raises(ValueError, match="argument 2"):
        clip.score(pictures(3), CAPTIONS[:2])


def test_pictures_are_resized_by_their_shorter_side_and_cut_to_the_middle(clip):
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste((0, 0, 255), (32, 0, 96, 64))
    blue = np.float32([0, 0, 1])
    expected = (blue - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    got = clip.prepare(wide)
    assert got.shape == (3, 32, 32)
    np.testing.assert_allclose(got[:, :, 4:-4], np.broadcast_to(expected[:, None, None], (3, 32, 24)), atol=1e-5)


def test_as_features_it_gives_a_vector_for_each_picture_and_says_which_clip_it_is(folder, clip, tmp_path):
    assert clip(pictures(3, (40, 32))).shape == (3, 16)
    assert "32" in clip.resize
    other = write_clip(tmp_path / "other")
    model = CLIPModel.from_pretrained(other)
    model.visual_projection.weight.data += 1
    model.save_pretrained(other)
    assert Clip.load(folder, torch.device("cpu")).identity == clip.identity
    assert Clip.load(other, torch.device("cpu")).identity != clip.identity


def test_a_text_longer_than_the_tower_reads_is_cut(clip):
    assert clip.read(["a fox " * 100]).shape == (1, 16)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_a_folder_without_both_towers_is_refused(folder, tmp_path, lacking):
    for path in folder.iterdir():
        if path.name != lacking:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="no CLIP with both towers"):
        Clip.load(tmp_path, torch.device("cpu"))
