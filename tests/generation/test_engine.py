"""What a run spares itself: texts that it has encoded already."""

from dataclasses import replace

from ldm.generation.request import Request
from ldm.generation.words import KEPT, Words

BASE = Request(prompt="a fox", steps=1, sampler="ddim", scale=2.0, width=32, height=32)


def test_a_text_is_encoded_once_in_all_batches(pipeline, draw, monkeypatch):
    shared = pipeline("text")
    monkeypatch.setattr(shared, "known", {})
    encoded, encode = [], shared.model.get_learned_conditioning
    monkeypatch.setattr(shared.model, "get_learned_conditioning", lambda texts: encoded.extend(texts) or encode(texts))
    first = draw("text", BASE, replace(BASE, prompt="a hare"))
    again = draw("text", replace(BASE, prompt="a hare"), BASE)
    assert encoded == ["a fox", "a hare", ""]
    assert first[0].shape == again[0].shape


def test_the_texts_that_are_remembered_are_those_that_were_wanted_last(pipeline):
    model, known = pipeline("text").model, {}
    Words(model, ["a fox"], BASE, known)
    Words(model, map(str, range(KEPT - 1)), BASE, known)
    Words(model, ["a fox", "one more"], BASE, known)
    texts = [text for text, *_ in known]
    assert len(texts) == KEPT
    assert "0" not in texts
    assert texts[-2:] == ["a fox", "one more"]
