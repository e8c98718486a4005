"""Learned words: prompts that say them are encoded as diffusers encodes them, and all else as before."""

import pytest
import torch
from adapters.both import PROMPTS, ours, their_states, theirs
from omegaconf import OmegaConf
from safetensors.torch import save_file
from support import GOLDENS, assert_matches

from ldm.adapters.textual_inversion import add_words, read_words, table
from ldm.errors import CheckpointError, RequestError
from ldm.models.load import build_model
from ldm.modules.encoders import text
from ldm.modules.encoders.clip import ClipConfig
from ldm.util import instantiate_from_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def model(folder):
    return ours(folder)


@pytest.fixture
def encoder(model):
    return model.cond_stage_model


def vectors(count: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed + count))


def states(model: torch.nn.Module, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model.get_learned_conditioning(prompts)


def saved(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def compvis(**words: torch.Tensor) -> dict:
    """What the code of the paper writes, with a star for each `star` in the names."""
    named = {name.replace("star", "*"): torch.nn.Parameter(vector) for name, vector in words.items()}
    return {"string_to_token": dict.fromkeys(named, torch.tensor(265)),
            "string_to_param": torch.nn.ParameterDict(named)}


def webui(vector: torch.Tensor, name: str) -> dict:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vector}, "name": name, "step": 500,
            "sd_checkpoint": None, "sd_checkpoint_name": None}


FILES = {
    "compvis": ("cat.pt", compvis(star=vectors(1)), ["*"]),
    "compvis, several": ("cat.pt", compvis(star=vectors(2), dog=vectors(1)), ["*", "dog"]),
    "diffusers": ("learned_embeds.bin", {"<cat-toy>": vectors(1)[0]}, ["<cat-toy>"]),
    "diffusers, safetensors": ("learned_embeds.safetensors", {"<cat-toy>": vectors(3)}, ["<cat-toy>"]),
    "web UI": ("cat.pt", webui(vectors(2), "my cat"), ["my cat"]),
    "web UI, safetensors": ("EasyCat.safetensors", {"emb_params": vectors(4)}, ["EasyCat"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_every_form_of_file_brings_its_words(tmp_path, form):
    name, content, want = FILES[form]
    assert [word.text for word in read_words(saved(tmp_path / name, content))] == want


@pytest.mark.parametrize("form", [form for form in FILES if form != "compvis, several"])
def test_a_word_of_ones_own_takes_the_place_of_the_files(tmp_path, form):
    name, content, _ = FILES[form]
    word, = read_words(saved(tmp_path / name, content), "sks")
    assert word.text == "sks"
    stored = next(iter(content.get("string_to_param", content).values()))
    assert torch.equal(word.vectors[0], torch.atleast_2d(stored.detach()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name, content", [
    ("learned_embeds.bin", lambda vector: {"<cat-toy>": vector}),
    ("learned_embeds.safetensors", lambda vector: {"<cat-toy>": vector}),
    ("cat.pt", lambda vector: webui(vector, "<cat-toy>")),
])  # fmt: skip
def test_prompts_with_the_word_are_encoded_as_in_diffusers(model, folder, tmp_path, name, content, count):
    path = saved(tmp_path / name, content(vectors(count)))
    pipeline = theirs(folder)
    pipeline.load_textual_inversion(str(tmp_path), weight_name=name)
    add_words(model, read_words(path))
    prompts = ["a <cat-toy> on a bench", "<cat-toy>", "two cats, one <cat-toy>, one <cat-toy>.", *PROMPTS]
    assert_matches(states(model, prompts), their_states(pipeline, prompts))


def test_the_word_stands_for_its_vectors_in_their_order(encoder, model, tmp_path):
    add_words(model, read_words(saved(tmp_path / "cat.pt", compvis(star=vectors(3)))))
    before, at, after = (encoder.spans(part)[0] for part in ("a photo of", "*", "on a bench"))
    assert encoder.spans("a photo of * on a bench")[0] == before + at + after
    assert torch.equal(table(encoder)(torch.tensor(at)), vectors(3))


def test_several_words_of_several_files_live_together(encoder, model, tmp_path):
    cat = read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(2)}))
    dog = read_words(saved(tmp_path / "bad-dog.safetensors", {"emb_params": vectors(3, seed=5)}))
    add_words(model, cat + dog)
    ids, _ = encoder.spans("cat bad-dog")
    assert ids == [800, 801, 802, 803, 804]
    assert torch.equal(table(encoder)(torch.tensor(ids)), torch.cat([vectors(2), vectors(3, seed=5)]))


@pytest.mark.parametrize("prompt, hits", [
    ("a cat", 1), ("CAT, Cat", 2), ("(cat:1.2)", 1), ("category", 0), ("a wildcat", 0), ("cat_toy", 0), ("<cat>", 1),
    ("cat's", 1),
])  # fmt: skip
def test_a_word_is_found_whole_and_in_any_case(encoder, model, tmp_path, prompt, hits):
    add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(1)})))
    assert encoder.spans(prompt)[0].count(800) == hits


def test_the_longest_of_overlapping_words_is_taken(encoder, model, tmp_path):
    words = {"cat": vectors(1), "cat of mine": vectors(1)}
    add_words(model, read_words(saved(tmp_path / "cats.bin", words)))
    assert encoder.spans("cat cat  of\nmine cat")[0] == [800, 801, 800]


def test_what_is_cut_from_a_prompt_is_quoted_with_its_words(encoder, model, tmp_path):
    add_words(model, read_words(saved(tmp_path / "long cat.safetensors", {"emb_params": vectors(40)})))
    assert encoder.dropped("long cat, red bench") == ""
    assert encoder.dropped("long cat, long cat, red bench") == "long cat, red bench"


def test_a_word_of_several_vectors_is_not_torn_between_chunks(encoder, model, tmp_path):
    add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(10)})))
    for chunk in encoder.chunks(" ".join(["tree"] * 20 + ["cat"] * 9)):
        assert sum(one >= 800 for one in chunk) % 10 == 0


def test_undoing_gives_back_the_encoder(encoder, model, tmp_path):
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    want = states(model, ["a cat"])
    added = add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(2)})))
    more = add_words(model, read_words(saved(tmp_path / "dog.safetensors", {"emb_params": vectors(2)})))
    assert not torch.equal(states(model, ["a cat"]), want)
    more.undo()
    added.undo()
    assert torch.equal(states(model, ["a cat"]), want)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[key]) for key, weight in after.items())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_half_precision_models_take_words_in_their_own(folder, tmp_path):
    model = ours(folder, torch.bfloat16)
    add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(2)})))
    assert table(model.cond_stage_model).weight.dtype == torch.bfloat16
    assert states(model, ["a cat"]).isfinite().all()


@pytest.mark.parametrize("width, family", [(1024, "Stable Diffusion 2"), (768, "Stable Diffusion 1")])
def test_vectors_of_another_width_are_refused_with_the_family(tmp_path, width, family):
    words = read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(1, width)}))
    config = "configs/stable-diffusion/v1-inference.yaml" if width == 1024 else GOLDENS / "tiny.yaml"
    model = build_model(config) if width == 1024 else with_encoder("FrozenCLIPEmbedder", version=str(CLIP))
    own = r"768 wide \(Stable Diffusion 1\)" if width == 1024 else "64 wide"
    with pytest.raises(CheckpointError, match=rf"the vectors of 'cat' are {width} wide \({family}\), the words of "
                                              rf"this model are {own}"):
        add_words(model, words)


CLIP = GOLDENS / "tiny-clip"


def with_encoder(target: str, **params) -> torch.nn.Module:
    """A tiny model with a text encoder of ldm.modules.encoders.modules."""
    config = OmegaConf.load(GOLDENS / "tiny.yaml").model
    config.params.cond_stage_config = {"target": f"ldm.modules.encoders.modules.{target}", "params": params}
    return instantiate_from_config(config).eval()


def test_vectors_for_the_two_encoders_of_xl_are_refused_by_a_model_of_one(model, tmp_path):
    words = read_words(saved(tmp_path / "cat.safetensors", {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}))
    with pytest.raises(CheckpointError, match=r"are 768 and 1280 wide \(Stable Diffusion XL\)"):
        add_words(model, words)


def test_a_model_that_reads_no_text_takes_no_words(tmp_path):
    model = instantiate_from_config(OmegaConf.load(GOLDENS / "tiny.yaml").model)
    with pytest.raises(RequestError, match="reads no text"):
        add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(1)})))


def test_two_files_with_one_word_must_be_told_apart(model, tmp_path):
    one = read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(1)}))
    two = read_words(saved(tmp_path / "learned.bin", {"Cat": vectors(1)}))
    with pytest.raises(RequestError, match=r"both bring the word 'Cat': name one of them otherwise, --embedding"):
        add_words(model, one + two)
    add_words(model, one + read_words(tmp_path / "learned.bin", "<cat>"))


def test_a_name_cannot_be_given_to_several_words(tmp_path):
    path = saved(tmp_path / "cats.bin", {"<a>": vectors(1), "<b>": vectors(1)})
    with pytest.raises(RequestError, match="has 2 words, <a>, <b>"):
        read_words(path, "sks")


@pytest.mark.parametrize("content", [
    {"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, {}, [1, 2], {"string_to_param": {}},
    {"string_to_param": {"*": "text"}}, {"": torch.ones(1, 4)}, {"cat": torch.ones(2, 2, 4)}, {"cat": torch.ones(0, 4)},
    {"cat": torch.ones(1, 4), "step": 3}, {"clip_l": 3, "clip_g": torch.ones(1, 4)},
])  # fmt: skip
def test_a_file_that_brings_no_words_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"cat.pt holds no embedding"):
        read_words(saved(tmp_path / "cat.pt", content))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the vectors of 'cat' are not finite"):
        read_words(saved(tmp_path / "cat.bin", {"cat": torch.full((1, 4), torch.inf)}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no embedding file .*nowhere.pt"):
        read_words(tmp_path / "nowhere.pt")


def test_openclip_takes_words_and_still_finds_the_end_of_a_text(monkeypatch, tmp_path):
    monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (ClipConfig(width=32, layers=2, heads=4, act="gelu"), 32))
    model = with_encoder("FrozenOpenCLIPEmbedder", arch="tiny")
    clip, encoder = model.cond_stage_model.model, model.cond_stage_model
    add_words(model, read_words(saved(tmp_path / "cat.safetensors", {"emb_params": vectors(2, 32)})))
    ids = encoder.tokenize(["a cat on a bench"])
    assert ids[0, :5].tolist() == [49406, 320, 49408, 49409, 525]
    end = ids[0].tolist().index(49407)
    assert torch.equal(clip.encode_text(ids), clip.text_states(ids)[:, end] @ clip.text_projection)
