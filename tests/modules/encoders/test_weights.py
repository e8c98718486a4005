import pytest
import torch
from support import GOLDENS, assert_matches

from ldm.errors import RequestError
from ldm.modules.encoders import openclip, text
from ldm.modules.encoders.clip import ClipConfig
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    FrozenCLIPEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
)
from ldm.prompt import parse_weights, plain_text

TINY = str(GOLDENS / "tiny-clip")
TOWER = ClipConfig(width=32, layers=2, heads=4)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "on", "hill", ",", "!"]


@pytest.fixture(params=["clip", "openclip", "bert"])
def encoder(request, monkeypatch, tmp_path):
    """Each class that gives a state for every token."""
    torch.manual_seed(0)
    if request.param == "clip":
        return FrozenCLIPEmbedder(TINY)
    if request.param == "openclip":
        monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (TOWER, 24))
        made = FrozenOpenCLIPEmbedder("tiny", layer="penultimate")
        torch.nn.init.normal_(made.model.ln_final.bias)
        return made
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    made = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=len(WORDS), vocabulary=str(tmp_path)).eval()
    torch.nn.init.normal_(made.transformer.norm.bias)
    return made.requires_grad_(False)


def weighed(encoder, prompt, count=None):
    """The plain states of a prompt, and the weighted ones."""
    read = parse_weights(prompt)
    words = plain_text(read)
    states = encoder.encode([words]) if count is None else encoder.encode_long([words], count)
    return states, encoder.weigh(states, read, count)


def by_hand(encoder, words):
    """Weights (77,) where a word may be several tokens."""
    weights = [weight for word, weight in words for _ in encoder.tokenizer.encode(word, add_special_tokens=False)]
    return torch.tensor([1, *weights, *[1] * (76 - len(weights))])


def test_each_state_is_multiplied_and_the_mean_is_what_it_was(encoder):
    plain, got = weighed(encoder, "a (cat:1.5) on [a] (hill:0.25)")
    weights = by_hand(encoder, [("a", 1), ("cat", 1.5), ("on", 1), ("a", 1 / 1.1), ("hill", 0.25)])
    scaled = plain[0] * weights[:, None]
    assert_matches(got[0], scaled * (plain.mean() / scaled.mean()), 1e-6)
    assert got.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


@pytest.mark.parametrize("prompt", ["a cat on a hill", "(a cat:1) on (a hill:1.0)", "([a cat on a hill])"])
def test_weights_of_one_change_no_bit(encoder, prompt):
    plain, got = weighed(encoder, prompt)
    assert got.equal(plain)
    assert plain.equal(encoder.encode(["a cat on a hill"]))


def test_what_is_cut_takes_its_weight_with_it(encoder):
    kept = " ".join(["!"] * 75)
    plain, got = weighed(encoder, f"{kept} (cat:3)")
    assert got.equal(plain)
    assert plain.equal(encoder.encode([kept]))
    assert encoder.token_weights(parse_weights(f"{kept[:-2]} (! cat:3)")).tolist() == [[1] * 75 + [3, 1]]


def test_each_chunk_keeps_its_own_mean(encoder):
    first, second = " ".join(["!"] * 75), "a (hill:2)"
    plain, got = weighed(encoder, f"{first} {second}", 3)
    assert got.shape[1] == 231
    assert got[:, :77].equal(plain[:, :77]) and got[:, 154:].equal(plain[:, 154:])
    assert_matches(got[:, 77:154], weighed(encoder, second)[1], 1e-5)


def test_half_precision_keeps_its_dtype_and_weights_of_one_keep_every_bit():
    encoder = FrozenCLIPEmbedder(TINY).to(torch.bfloat16)
    plain, got = weighed(encoder, "a (cat:1.5)")
    assert got.dtype == torch.bfloat16 and not got.equal(plain)
    plain, got = weighed(encoder, "a (cat:1.0)")
    assert got.equal(plain)


def test_states_without_a_mean_are_only_multiplied(monkeypatch):
    monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (TOWER, 24))
    torch.manual_seed(0)
    encoder = FrozenOpenCLIPEmbedder("tiny")  # its last norm has no bias yet
    plain, got = weighed(encoder, "a (cat:1.5)")
    assert_matches(got[0, 2], plain[0, 2] * 1.5, 1e-6)
    assert got[0, :2].equal(plain[0, :2])


def test_entities_count_as_what_they_stand_for(monkeypatch):
    monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (TOWER, 24))
    rows = FrozenOpenCLIPEmbedder("tiny").token_weights(parse_weights("a &amp; (b:2) &amp; (\u201cc:3)"))
    assert rows[0, :8].tolist() == [1, 1, 1, 2, 1, 3, 3, 1]


def test_a_text_that_is_one_vector_cannot_be_weighed(monkeypatch):
    with pytest.raises(RequestError, match=r"FrozenCLIPEmbedder.*cannot weigh"):
        weighed(FrozenCLIPEmbedder(TINY, layer="pooled"), "a (cat)")
    monkeypatch.setitem(openclip.CLIP_PACKAGE, "ViT-L/14", (TOWER, None, 24, "nobody/absent"))
    with pytest.raises(RequestError, match=r"FrozenCLIPTextEmbedder.*cannot weigh"):
        weighed(FrozenCLIPTextEmbedder(), "a (cat)")
