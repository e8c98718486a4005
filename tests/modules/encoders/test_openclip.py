import pytest
import torch
from support import assert_matches, manifest
from transformers import CLIPConfig, CLIPModel

from ldm.errors import ConfigError
from ldm.modules.encoders import openclip, text
from ldm.modules.encoders.clip import ClipConfig
from ldm.modules.encoders.modules import FrozenCLIPImageEmbedder, FrozenCLIPTextEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.openclip import Clip, from_transformers, published_clip

TEXT = ClipConfig(width=32, layers=3, heads=4)
VISION = ClipConfig(width=48, layers=2, heads=3, image=32, patch=8)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
            "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 32, "patch_size": 8,
        },
        projection_dim=24,
    )).eval()


@pytest.fixture
def tiny(monkeypatch, theirs, tmp_path):
    """The package's names with a tiny architecture, whose weights lie in models/tiny-clip in the transformers form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(openclip.CLIP_PACKAGE, "ViT-L/14", (TEXT, VISION, 24, "nobody/tiny-clip"))
    monkeypatch.setitem(text.OPEN_CLIP_ARCHS, "tiny", (TEXT, 24))
    theirs.save_pretrained(tmp_path / "models" / "tiny-clip")


def keys_below(name: str) -> dict:
    prefix = "cond_stage_model."
    return {key.removeprefix(prefix): value for key, value in manifest(name).items() if key.startswith(prefix)}


def layout(module: torch.nn.Module) -> dict:
    return {key: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for key, v in module.state_dict().items()}


def test_the_v2_encoder_has_the_keys_of_the_checkpoint_and_a_real_mask_on_meta():
    with torch.device("meta"):
        encoder = FrozenOpenCLIPEmbedder(layer="penultimate")
    assert layout(encoder) == keys_below("sd-v2-base")
    assert encoder.model.attn_mask[:2, :2].tolist() == [[0, -torch.inf], [0, 0]]


def test_the_image_encoder_has_the_keys_of_the_checkpoint():
    with torch.device("meta"):
        encoder = FrozenCLIPImageEmbedder()
    assert layout(encoder) == keys_below("sd-image-variations")


def test_both_towers_equal_those_of_transformers(theirs):
    clip = Clip(TEXT, VISION, 24)
    clip.load_state_dict(from_transformers(theirs.state_dict()), strict=False)
    ids = torch.tensor([[49406, 5, 6, 49407, 0], [49406, 5, 6, 7, 49407]])
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels)
        words, picture = clip.encode_text(ids), clip.encode_image(pixels)
    assert_matches(words / words.norm(dim=-1, keepdim=True), want.text_embeds, 1e-5)
    assert_matches(picture / picture.norm(dim=-1, keepdim=True), want.image_embeds, 1e-5)


def test_no_weight_of_transformers_is_lost_in_renaming(theirs):
    clip = Clip(TEXT, VISION, 24)
    named = from_transformers(theirs.state_dict())
    assert set(clip.state_dict()) <= set(named)
    assert all("position_ids" in key for key in set(named) - set(clip.state_dict()))


@pytest.mark.parametrize(("layer", "count"), [("last", 3), ("penultimate", 2)])
def test_layer_chooses_the_block_that_the_final_norm_follows(tiny, theirs, layer, count):
    encoder = FrozenOpenCLIPEmbedder("tiny", layer=layer)
    encoder.model.load_state_dict(from_transformers(theirs.state_dict()), strict=False)
    ids = encoder.tokenize("a photograph of an astronaut")
    with torch.no_grad():
        states = theirs.text_model(input_ids=ids, output_hidden_states=True).hidden_states[count]
        want = theirs.text_model.final_layer_norm(states) if layer == "penultimate" else theirs.text_model(ids)[0]
        assert_matches(encoder.encode("a photograph of an astronaut"), want, 1e-5)


def test_texts_are_padded_with_zero_and_read_without_entities_or_typographic_quotes(tiny):
    encoder = FrozenOpenCLIPEmbedder("tiny")
    assert encoder.tokenize("a cat")[0].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    assert encoder.tokenize("it&amp;#39;s \u201ca\u201d cat").equal(encoder.tokenize("it's \"a\" cat"))


def test_long_prompts_are_cut_or_chunked_here_too(tiny, caplog):
    encoder = FrozenOpenCLIPEmbedder("tiny")
    long = " ".join(["cat"] * 75) + " and dog"
    assert encoder.dropped(long) == "and dog"
    assert encoder.encode(long).shape == (1, 77, 32)
    assert "'and dog'" in caplog.text
    assert len(encoder.chunks(long)) == 2
    assert encoder.encode_long([long, "a"]).shape == (2, 154, 32)


def test_unknown_names_are_refused_with_what_would_work():
    with pytest.raises(ConfigError, match="ViT-H-14"):
        FrozenOpenCLIPEmbedder("ViT-Z")
    with pytest.raises(ConfigError, match="penultimate"):
        FrozenOpenCLIPEmbedder(layer="first")
    with pytest.raises(ConfigError, match="ViT-L/14"):
        FrozenCLIPTextEmbedder("ViT-Z")


def test_the_text_vector_is_that_of_the_local_copy_of_the_weights(tiny, theirs):
    encoder = FrozenCLIPTextEmbedder(n_repeat=3)
    texts = ["a cat", "a photograph of an astronaut"]
    with torch.no_grad():
        want = theirs(input_ids=encoder.tokenize(texts), pixel_values=torch.zeros(1, 3, 32, 32)).text_embeds
    assert_matches(encoder(texts), want, 1e-5)
    assert encoder.encode(texts).shape == (2, 3, 24)
    assert encoder.encode(texts)[:, 2].equal(encoder(texts))


def test_the_vector_keeps_its_length_without_normalize(tiny):
    plain, unit = FrozenCLIPTextEmbedder(normalize=False)("a cat"), FrozenCLIPTextEmbedder()("a cat")
    assert_matches(plain / plain.norm(), unit, 1e-5)
    assert abs(plain.norm() - 1) > 1e-3


def test_the_image_vector_is_that_of_the_local_copy_of_the_weights(tiny, theirs):
    encoder = FrozenCLIPImageEmbedder(model="ViT-L/14")
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        pooled = theirs.vision_model(((image + 1) / 2 - mean) / std).pooler_output
        assert_matches(encoder(image), theirs.visual_projection(pooled), 1e-5)
    assert encoder.encode(image).shape == (2, 1, 24)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_picture_of_one_colour_stays_so_when_it_is_resized(tiny, antialias):
    encoder = FrozenCLIPImageEmbedder(antialias=antialias)
    pixels = encoder.preprocess(torch.ones(1, 3, 70, 50))
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3, rtol=0)


def test_texts_in_place_of_pictures_are_nothing(tiny):
    assert FrozenCLIPImageEmbedder().encode([""] * 2).equal(torch.zeros(2, 1, 24))


def test_without_a_local_copy_a_warning_says_that_the_weights_are_random(tiny, monkeypatch, caplog):
    monkeypatch.setitem(openclip.CLIP_PACKAGE, "ViT-B/32", (TEXT, VISION, 24, "nobody/absent"))
    published_clip("ViT-B/32")
    assert "nobody/absent" in caplog.text


def test_half_precision_gives_the_weights_dtype(tiny):
    for encoder, data in (
        (FrozenOpenCLIPEmbedder("tiny"), ["a"]),
        (FrozenCLIPTextEmbedder(), ["a"]),
        (FrozenCLIPImageEmbedder(), torch.zeros(1, 3, 32, 32)),
    ):
        want = encoder.encode(data)
        got = encoder.to(torch.bfloat16).encode(data)
        assert got.dtype == torch.bfloat16
        assert_matches(got.float(), want, 0.05)
