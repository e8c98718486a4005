"""How adapters are named on the command line, and what becomes of a record that was tampered with."""

import pytest

from ldm.errors import ImageError, RequestError
from ldm.generation.adapters import recall
from ldm.generation.options import ModelOptions, learned, weighted


@pytest.mark.parametrize("option, want", [
    ("style.safetensors", ("style.safetensors", 1.0)),
    ("style.safetensors:0.8", ("style.safetensors", 0.8)),
    ("style.safetensors:-1e-1", ("style.safetensors", -0.1)),
    ("style.safetensors:", ("style.safetensors", 1.0)),
    ("a: b.safetensors", ("a: b.safetensors", 1.0)),
    (r"C:\loras\style.safetensors", (r"C:\loras\style.safetensors", 1.0)),
    (r"C:\loras\style.safetensors:0.5", (r"C:\loras\style.safetensors", 0.5)),
    ("at:10/style.safetensors", ("at:10/style.safetensors", 1.0)),
])  # fmt: skip
def test_a_lora_is_named_with_its_weight(option, want):
    assert weighted(option) == want


@pytest.mark.parametrize("option, want", [
    ("cat.pt", ("cat.pt", None)), ("cat.pt:<cat>", ("cat.pt", "<cat>")), ("cat.pt:my cat", ("cat.pt", "my cat")),
    (r"C:\cat.pt", (r"C:\cat.pt", None)),
])  # fmt: skip
def test_an_embedding_is_named_with_its_word(option, want):
    assert learned(option) == want


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number_is_refused_before_anything_is_read(weight):
    with pytest.raises(RequestError, match="must be a finite number"):
        ModelOptions(lora=(f"style.safetensors:{weight}",))


@pytest.mark.parametrize("lora, embedding", [
    (3, []), ([3], []), ([{}], []), ([{"file": "a", "sha256": "b"}], []),
    ([], [{"file": "a", "sha256": 1, "words": []}]),
    ([], [{"file": 3, "sha256": "b", "words": ["w"]}]), ([{"file": "a", "sha256": "b", "weight": "x"}], []),
])  # fmt: skip
def test_a_damaged_record_is_one_clear_error(lora, embedding):
    with pytest.raises(ImageError, match="adapters is not complete"):
        recall({"lora": lora, "embedding": embedding})
