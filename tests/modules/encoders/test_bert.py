import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from support import assert_matches, manifest
from transformers import BertTokenizer

from ldm.errors import ConfigError
from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer, TransformerEmbedder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "on", "hill", ",", "!", "cafe"]


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


def test_the_1p4b_encoder_has_the_keys_of_the_checkpoint_and_needs_no_vocabulary_to_be_built():
    with torch.device("meta"):
        encoder = BERTEmbedder(n_embed=1280, n_layer=32)
    prefix = "cond_stage_model."
    assert {key: tuple(weight.shape) for key, weight in encoder.state_dict().items()} == {
        key.removeprefix(prefix): shape
        for key, (shape, _) in manifest("ldm-txt2img-1p4B").items() if key.startswith(prefix)
    }


def test_the_transformer_equals_that_of_diffusers():
    torch.manual_seed(0)
    theirs = LDMBertModel(LDMBertConfig(
        vocab_size=13, max_position_embeddings=9, encoder_layers=2, encoder_ffn_dim=96, d_model=24,
    )).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = TransformerEmbedder(n_embed=24, n_layer=2, vocab_size=13, max_seq_len=9)
    names = {"token_emb": theirs.model.embed_tokens, "pos_emb.emb": theirs.model.embed_positions,
             "norm": theirs.model.layer_norm, "to_logits": theirs.to_logits}
    for index, layer in enumerate(theirs.model.layers):
        attention, perceptron = f"attn_layers.layers.{2 * index}", f"attn_layers.layers.{2 * index + 1}"
        names |= {f"{attention}.0": layer.self_attn_layer_norm, f"{perceptron}.0": layer.final_layer_norm}
        for part in ("q", "k", "v", "out"):
            names[f"{attention}.1.to_{part}"] = getattr(layer.self_attn, f"{part}_proj")
        names |= {f"{perceptron}.1.net.0.0": layer.fc1, f"{perceptron}.1.net.2": layer.fc2}
    ours.transformer.load_state_dict({
        f"{name}.{kind}": weight for name, module in names.items() for kind, weight in module.state_dict().items()
    })
    ids = torch.randint(0, 13, (2, 9))
    with torch.no_grad():
        want = theirs.model(ids).last_hidden_state
        assert_matches(ours.encode(ids), want, 1e-5)
        assert_matches(ours.transformer(ids), theirs.to_logits(want), 1e-5)


@pytest.mark.parametrize("text", ["A cat, on a hill!", "cats CAFÉ dog", "", "a [MASK] [PAD] x" + " cat" * 30])
def test_ids_are_those_of_transformers(vocabulary, text):
    theirs = BertTokenizer(vocab=str(vocabulary / "vocab.txt"))
    want = theirs(text, truncation=True, max_length=12, padding="max_length", return_tensors="pt")["input_ids"]
    got = BERTTokenizer(max_length=12, vocabulary=str(vocabulary))
    assert got(text).tolist() == want.tolist()
    plain = {"skip_special_tokens": True}
    assert got.tokenizer.decode(got(text)[0], **plain) == theirs.decode(want[0], **plain)


def test_the_tokenizer_answers_in_the_form_of_a_vq_model(vocabulary):
    ids = BERTTokenizer(vocabulary=str(vocabulary / "vocab.txt")).encode("a cat")
    assert ids[0] is ids[1] is None
    assert ids[2][2][0, :4].tolist() == [2, 5, 6, 3]


def test_texts_become_states_and_long_ones_are_cut_or_chunked(vocabulary, caplog):
    encoder = BERTEmbedder(16, 1, vocab_size=13, max_seq_len=6, vocabulary=str(vocabulary))
    assert encoder.encode(["a cat", "a"]).shape == (2, 6, 16)
    assert not caplog.records
    assert encoder.encode("a cat on a HILL").shape == (1, 6, 16)
    assert "'HILL'" in caplog.text
    assert encoder.encode_long(["a cat on a cats"]).shape == (1, 12, 16)
    assert encoder.chunks("a cat on cats") == [[5, 6, 8], [6, 7]]


def test_ids_may_stand_in_place_of_texts():
    encoder = BERTEmbedder(16, 1, vocab_size=13, max_seq_len=6, use_tokenizer=False)
    assert encoder.encode(torch.tensor([[1, 2, 3]])).shape == (1, 3, 16)


def test_without_a_vocabulary_the_error_says_where_to_put_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match="models/bert-base-uncased"):
        BERTTokenizer()("a cat")
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        BERTTokenizer(vocabulary="nowhere.txt")("a cat")


@pytest.mark.parametrize("place", ["models/bert-base-uncased", "hub/models--bert-base-uncased/snapshots/0"])
def test_the_vocabulary_is_found_among_models_or_in_the_hugging_face_cache(vocabulary, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / place).mkdir(parents=True)
    (vocabulary / "vocab.txt").rename(tmp_path / place / "vocab.txt")
    refs = tmp_path / "hub" / "models--bert-base-uncased" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0")
    assert BERTTokenizer()("a cat")[0, :4].tolist() == [2, 5, 6, 3]


def test_a_file_that_is_no_vocabulary_of_bert_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="lacks"):
        BERTTokenizer(vocabulary=str(tmp_path))("a")
