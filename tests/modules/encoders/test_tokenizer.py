import json

import pytest
import torch
from support import GOLDENS
from transformers import CLIPTokenizer

from ldm.errors import ConfigError
from ldm.modules.encoders.tokenizer import clip_tokenizer, clip_vocabulary

PROMPTS = json.loads((GOLDENS / "clip_token_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ours():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def theirs():
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_clip(ours, prompt):
    assert ours(prompt, add_special_tokens=False)["input_ids"] == PROMPTS[prompt]
    assert ours(prompt).input_ids == [49406, *PROMPTS[prompt], 49407]


@pytest.mark.parametrize("prompt", [*PROMPTS, "a <|endoftext|> b", "Émile  İstanbul ＡＢＣ ﬁ é", "don'T 'S"])
def test_every_answer_equals_that_of_transformers(ours, theirs, prompt):
    call = {"return_offsets_mapping": True}
    assert ours(prompt, **call) == dict(theirs(prompt, **call))
    call = {"truncation": True, "max_length": 12, "padding": "max_length", "return_length": True}
    assert ours([prompt, "a"], **call) == dict(theirs([prompt, "a"], **call))
    assert ours([prompt, "a"], padding=True) == dict(theirs([prompt, "a"], padding=True))
    ids = ours(prompt)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.tokenize(prompt) == theirs.tokenize(prompt) == ours.convert_ids_to_tokens(ids[1:-1])


def test_the_vocabulary_and_its_marks_equal_those_of_transformers(ours, theirs):
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == ours.vocab_size == 49408
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "bos_token", "eos_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_tensors_are_batches_even_for_one_text(ours):
    batch = ours("a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 77)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][0, 3:].eq(49407).all()


def test_new_words_get_ids_past_the_last_and_leave_other_tokenizers_alone(ours):
    own = clip_tokenizer()
    assert own.add_tokens(["<my-cat>"]) == 1
    assert own("a <my-cat>")["input_ids"] == [49406, 320, 49408, 49407]
    assert own.convert_tokens_to_ids("<my-cat>") == 49408
    assert "<my-cat>" not in ours.get_vocab()


def test_padding_may_be_id_zero():
    tokenizer = clip_tokenizer(pad_token="!")
    assert tokenizer("a", padding="max_length", max_length=5)["input_ids"] == [49406, 320, 49407, 0, 0]


def test_a_folder_brings_its_own_vocabulary():
    tokenizer = clip_tokenizer(GOLDENS / "tiny-clip")
    assert len(tokenizer) == 800
    assert tokenizer("fantasy horse")["input_ids"] == [798, 796, 789, 799]


def test_a_tokenizer_json_is_read_too(tmp_path, ours):
    ours.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert clip_tokenizer(tmp_path)("a photograph")["input_ids"] == ours("a photograph")["input_ids"]


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"vocab\.json"):
        clip_tokenizer(tmp_path)


@pytest.mark.parametrize("call", [{"return_tensors": "np"}, {"return_overflowing_tokens": True}])
def test_what_is_not_offered_is_refused(ours, call):
    with pytest.raises(ValueError, match="return_tensors"):
        ours("a", **call)
