"""The small CLIP of the shapes world: its tokenizer, what its losses measure and the folder that it leaves."""

import json
from random import Random

import pytest
import torch
from torch.utils.data import default_collate

from ldm.data.shapes import ShapesDataset, sample_caption
from ldm.modules.encoders.text import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import clip_tokenizer

TOWER = {"width": 32, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from ldm.training.contrastive import ContrastiveModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    return ContrastiveModel(str(folder), {**TOWER, "length": 20}, {**TOWER, "image": 32, "patch": 8}, embed=16)


@pytest.fixture(scope="module")
def batch():
    shapes = ShapesDataset(4, size=32)
    return default_collate([shapes[i] for i in range(4)])


def test_the_tokenizer_spells_words_of_the_world_as_clip_does_and_others_by_their_letters(model):
    whole = clip_tokenizer()
    for i in range(50):
        caption = str(sample_caption(Random(i), split="all"))
        assert model.tokenizer.tokenize(caption) == whole.tokenize(caption)
    assert model.tokenizer.tokenize("zebra") == ["z", "e", "b", "r", "a</w>"]
    assert len(model.tokenizer) < 700


def test_every_caption_fits_into_the_text_tower(model):
    captions = [str(sample_caption(Random(i), split="all", pairs=1.0)) for i in range(200)]
    assert max(len(ids) for ids in model.tokenizer(captions)["input_ids"]) <= 20


def test_attributes_are_the_words_of_a_caption_by_number():
    from ldm.training.contrastive import ATTRIBUTES, attributes

    def words(text: str) -> list:
        return [names[i] for names, i in zip(ATTRIBUTES.values(), attributes(text))]

    assert words("a small red ring on a blue background") == ["small", "red", "ring", None, None, None, "blue"]
    assert words("a red ring above a pink heart on a cyan background") == [
        None, "red", "ring", "above", "pink", "heart", "cyan"]  # fmt: skip


def test_a_few_steps_on_one_batch_lower_both_losses(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, parts = model.losses(batch, "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts)
    for name in ("train/contrast", "train/reading"):
        assert losses[-1][name] < 0.8 * losses[0][name]
    assert losses[-1]["train/attributes"] > losses[0]["train/attributes"]


def test_the_folder_is_read_by_our_embedder_and_by_transformers_alike(model):
    from transformers import CLIPModel

    model.save_folder()
    embedder = FrozenCLIPEmbedder(str(model.folder), max_length=20)
    theirs = CLIPModel.from_pretrained(model.folder).eval()
    ids = embedder.tokenize(["a small red ring on a blue background", ""])
    with torch.no_grad():
        states = embedder.encode_ids(ids)
        torch.testing.assert_close(theirs.text_model(input_ids=ids).last_hidden_state, states, atol=1e-5, rtol=1e-4)
        vectors, _ = model.encode_text(["a small red ring on a blue background"])
        pooled = theirs.get_text_features(input_ids=ids[:1])
    pooled = getattr(pooled, "pooler_output", pooled)
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), vectors, atol=1e-5, rtol=1e-4)
    assert json.loads((model.folder / "config.json").read_text())["vision_config"]["image_size"] == 32


def test_pictures_of_any_side_are_brought_to_that_of_the_tower(model):
    large = torch.rand(2, 3, 64, 64) * 2 - 1
    assert model.encode_image(large).shape == (2, 16)
    torch.testing.assert_close(model.encode_image(large).norm(dim=-1), torch.ones(2))


def test_a_locked_text_tower_stays_as_it_was_saved_while_pictures_are_learnt(model, batch):
    from ldm.training.contrastive import ContrastiveModel

    model.save_folder()
    locked = ContrastiveModel(str(model.folder), model.text, model.vision, embed=16, locked_text=True)
    before = {name: weight.clone() for name, weight in locked.named_parameters()}
    torch.testing.assert_close(before["text_projection.weight"], model.text_projection.weight)
    optimizer = torch.optim.AdamW(locked.parameters(), lr=1e-2)
    locked.losses(batch, "train")[0].backward()
    optimizer.step()
    changed = {name for name, weight in locked.named_parameters() if not torch.equal(weight, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"vision_model", "visual_projection", "logit_scale"}
