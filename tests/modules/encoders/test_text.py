import fill
import pytest
import torch
from support import GOLDENS, assert_matches, golden, manifest
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.errors import CheckpointError, ConfigError
from ldm.modules.encoders.clip import ClipConfig, ClipTextTransformer
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

TINY = str(GOLDENS / "tiny-clip")


@pytest.fixture(scope="module")
def tiny():
    return FrozenCLIPEmbedder(TINY)


def keys_below(name: str, prefix: str = "cond_stage_model.") -> dict:
    return {key.removeprefix(prefix): value for key, value in manifest(name).items() if key.startswith(prefix)}


def layout(module: torch.nn.Module) -> dict:
    return {key: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for key, v in module.state_dict().items()}


def test_the_v1_encoder_has_the_keys_of_the_checkpoint_and_real_positions_on_meta():
    with torch.device("meta"):
        encoder = FrozenCLIPEmbedder()
    assert layout(encoder) == keys_below("sd-v1")
    assert encoder.transformer.text_model.embeddings.position_ids.tolist() == [list(range(77))]
    assert all(not p.requires_grad for p in encoder.parameters())


def test_tiny_clip_gives_the_golden_states(tiny):
    out = tiny.transformer(input_ids=golden("inputs")["ids"])
    assert_matches(out.last_hidden_state, golden("clip_text")["clip_text/last_hidden_state"])


def test_a_folder_holds_the_weights_of_the_rule(tiny):
    ruled = fill.fill_module(FrozenCLIPEmbedder(TINY), prefix="cond_stage_model.")
    for key, weight in ruled.state_dict().items():
        torch.testing.assert_close(tiny.state_dict()[key], weight, rtol=0, atol=0)


def test_a_folder_of_the_repository_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.modules.encoders.files.REPOSITORY", GOLDENS)
    assert FrozenCLIPEmbedder("tiny-clip").transformer.config.width == 64
    with pytest.raises(ConfigError, match="must be a folder"):
        FrozenCLIPEmbedder("no-clip")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [9, 2])
def test_the_text_tower_equals_that_of_transformers(act, eos):
    torch.manual_seed(0)
    theirs = CLIPTextModel(CLIPTextConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, hidden_act=act, eos_token_id=eos, bos_token_id=8, pad_token_id=1,
    )).eval()
    ours = ClipTextTransformer(ClipConfig(32, 3, 4, 48, act, vocabulary=10, length=12, eos=None if eos == 2 else eos))
    ours.load_state_dict({
        key if key.startswith("text_model.") else f"text_model.{key}": weight
        for key, weight in theirs.state_dict().items()
    } | {"text_model.embeddings.position_ids": torch.arange(12)[None]})
    ids = torch.tensor([[8, 3, 4, 9, 9, 9], [8, 5, 6, 7, 1, 9]])
    with torch.no_grad():
        got, want = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert_matches(got.last_hidden_state, want.last_hidden_state, 1e-5)
    assert_matches(got.pooler_output, want.pooler_output, 1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for mine, other in zip(got.hidden_states[:-1], want.hidden_states[:-1]):
        assert_matches(mine, other, 1e-5)


def test_layer_chooses_what_comes_out():
    texts = ["a red fox", "a hill"]
    out = FrozenCLIPEmbedder(TINY).transformer(FrozenCLIPEmbedder(TINY).tokenize(texts), output_hidden_states=True)
    assert FrozenCLIPEmbedder(TINY).encode(texts).equal(out.last_hidden_state)
    assert FrozenCLIPEmbedder(TINY, layer="pooled").encode(texts).equal(out.pooler_output[:, None])
    assert FrozenCLIPEmbedder(TINY, layer="hidden", layer_idx=-2).encode(texts).equal(out.hidden_states[1])


@pytest.mark.parametrize("wrong", [
    {"layer": "first"}, {"layer": "hidden"}, {"layer": "last", "layer_idx": 1}, {"layer": "hidden", "layer_idx": 3},
])
def test_a_layer_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ConfigError, match="layer"):
        FrozenCLIPEmbedder(TINY, **wrong)


def test_an_unknown_version_is_refused_with_what_would_work():
    with pytest.raises(ConfigError, match=r"'openai/clip-huge'.*openai/clip-vit-large-patch14"):
        FrozenCLIPEmbedder("openai/clip-huge")


def test_a_folder_without_weights_is_refused_unless_built_on_meta(tmp_path):
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GOLDENS / "tiny-clip" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FrozenCLIPEmbedder(str(tmp_path))
    with torch.device("meta"):
        assert FrozenCLIPEmbedder(str(tmp_path)).transformer.config.width == 64


def test_a_folder_may_hold_an_old_bin_file_without_the_text_model_level(tmp_path, tiny):
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((GOLDENS / "tiny-clip" / name).read_bytes())
    state = {k.removeprefix("text_model."): v for k, v in tiny.transformer.state_dict().items() if "_ids" not in k}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert FrozenCLIPEmbedder(str(tmp_path)).encode("a fox").equal(tiny.encode("a fox"))
    del state["final_layer_norm.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lack.*: text_model\.final_layer_norm\.bias"):
        FrozenCLIPEmbedder(str(tmp_path))


@pytest.mark.parametrize(("config", "complaint"), [
    ("{}", "no 'hidden_size'"),
    ('{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "hidden_act": "x"}',
     "hidden_act must be quick_gelu or gelu, got 'x'"),
    ("not json", "cannot read"),
])
def test_a_folder_whose_config_cannot_be_used_is_refused(tmp_path, config, complaint):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=complaint):
        FrozenCLIPEmbedder(str(tmp_path))


def test_a_prompt_that_fits_is_encoded_in_silence(tiny, caplog):
    assert tiny.encode(["a red fox"]).shape == (1, 77, 64)
    assert tiny.dropped("a red fox") == ""
    assert not caplog.records


def test_a_prompt_that_is_too_long_is_cut_and_the_warning_quotes_what_was_lost(tiny, caplog):
    kept, lost = " ".join(["!"] * 75), "Fantasy  HORSE, on the hill"
    states = tiny.encode([f"{kept} {lost}"] * 2)
    assert tiny.dropped(f"{kept} {lost}") == lost
    assert [record.getMessage() for record in caplog.records] == [
        f"the prompt is longer than 75 tokens; this was dropped: {lost!r}"
    ]
    assert states[0].equal(tiny.encode(kept)[0])


def test_long_prompts_are_encoded_in_chunks_of_which_each_has_its_marks(tiny):
    long = " ".join(["fox"] * 70) + ", " + " ".join(["horse"] * 20)
    first, second = " ".join(["fox"] * 70) + ",", " ".join(["horse"] * 20)
    states = tiny.encode_long([long, "hill"])
    assert states.shape == (2, 154, 64)
    for got, parts in zip(states, [[first, second], ["hill", ""]]):
        assert_matches(got, tiny.encode(parts).flatten(0, 1))
    assert tiny.encode_long(["hill"], count=2)[0].equal(states[1])


def test_a_short_prompt_in_chunks_is_the_same_as_without(tiny):
    assert tiny.encode_long(["a red fox"]).equal(tiny.encode(["a red fox"]))


def test_too_few_chunks_are_refused(tiny):
    with pytest.raises(ValueError, match="needs 2 chunks, got count=1"):
        tiny.encode_long([" ".join(["fox"] * 80)], count=1)


def test_inputs_follow_the_weights_and_a_device_set_from_outside_is_respected():
    encoder = FrozenCLIPEmbedder(TINY, device="cuda")
    assert encoder.device == torch.device("cpu")
    assert encoder.encode("a fox").device.type == "cpu"
    encoder.device = "meta"
    assert encoder.tokenize("a fox").is_meta


def test_half_precision_gives_the_weights_dtype_and_nearly_the_same_states(tiny):
    half = FrozenCLIPEmbedder(TINY).to(torch.bfloat16)
    got = half.encode("a red fox on a hill")
    assert got.dtype == torch.bfloat16
    assert_matches(got.float(), tiny.encode("a red fox on a hill"), 0.05)
