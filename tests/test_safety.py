import json

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ldm.errors import CheckpointError, ConfigError, RequestError
from ldm.modules.encoders.clip import ClipConfig
from ldm.safety import SafetyChecker, SafetyNetwork, Verdict, apply, prepare

CONFIG = {
    "projection_dim": 24,
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu",
    },
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(**CONFIG)).eval()
    for parameter in checker.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checker.special_care_embeds_weights.data = torch.tensor([0.1, 0.2, 0.3])
    return checker


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The checker in the form of the published one, weights and all."""
    folder = tmp_path_factory.mktemp("checker")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    level = "vision_model.vision_model."
    state = {
        key if key.startswith(level) else key.replace("vision_model.", level, 1): value
        for key, value in theirs.state_dict().items()
    }
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    sizes = [(40, 32), (32, 32), (33, 71), (90, 47), (64, 64), (32, 200)]
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes] + [
        Image.new("RGB", (50, 50), colour) for colour in ("black", "white", "red", "green", "blue", "yellow")
    ]


def test_the_network_has_the_names_of_the_published_checkpoint():
    with torch.device("meta"):
        network = SafetyNetwork(ClipConfig(width=1024, layers=24, heads=16))
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    assert len(shapes) == 397
    assert shapes["vision_model.vision_model.embeddings.class_embedding"] == (1024,)
    assert shapes["vision_model.vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["vision_model.vision_model.pre_layrnorm.weight"] == (1024,)
    assert shapes["vision_model.vision_model.encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["visual_projection.weight"] == (768, 1024)
    assert shapes["concept_embeds"] == (17, 768)
    assert shapes["special_care_embeds_weights"] == (3,)


def test_pictures_are_prepared_as_the_feature_extractor_of_clip_does(pictures):
    extract = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for picture in pictures:
        want = np.asarray(extract(picture)["pixel_values"][0])
        np.testing.assert_allclose(prepare(picture, 32), want, atol=1e-5)


def test_verdicts_equal_those_of_diffusers_at_every_strictness(theirs, folder, pictures):
    pixels = torch.from_numpy(np.stack([prepare(picture, 32) for picture in pictures]))
    checker = SafetyChecker.load(folder)
    flags = []
    for threshold in torch.linspace(0, 0.6, 40):
        thresholds = threshold + torch.linspace(-0.05, 0.05, 17)
        theirs.concept_embeds_weights.data = checker.network.concept_embeds_weights.data = thresholds
        _, want = theirs(pixels, [np.zeros((2, 2, 3))] * len(pictures))
        got = checker.check(pictures)
        assert [verdict.flagged for verdict in got] == want
        assert [bool(verdict.concepts) for verdict in got] == want
        flags.append(sum(want))
    assert flags[0] == len(pictures) and flags[-1] == 0 and len(set(flags)) > 3, flags


def test_near_a_special_concept_every_threshold_is_a_hundredth_lower(folder):
    network = SafetyChecker.load(folder).network
    pixels = torch.randn(2, 3, 32, 32)
    network.special_care_embeds_weights.data = torch.tensor([2.0, 2.0, 2.0])
    usual = network(pixels)
    network.special_care_embeds_weights.data = torch.tensor([2.0, -2.0, 2.0])
    torch.testing.assert_close(network(pixels), usual + 0.01, atol=1.1e-3, rtol=0)
    assert (network(pixels) > usual).all()


def test_pictures_of_any_mode_are_judged_and_none_give_none(folder):
    checker = SafetyChecker.load(folder)
    modes = [Image.new(mode, (9, 5)) for mode in ("RGB", "RGBA", "L", "P")]
    assert len(set(checker.check(modes))) == 1
    assert checker.check([]) == []


def test_without_weights_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"CompVis/stable-diffusion-safety-checker in models/safety-checker"):
        SafetyChecker.load()
    with pytest.raises(CheckpointError, match="elsewhere"):
        SafetyChecker.load("elsewhere")
    assert SafetyChecker.load(required=False) is None


def test_the_checker_is_found_among_models(folder, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "safety-checker").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert SafetyChecker.load(required=False) is not None


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="concept_embeds"):
        SafetyChecker.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vision_config"):
        SafetyChecker.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("<html>")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="web page"):
        SafetyChecker.load(tmp_path)


@pytest.mark.parametrize("action", ["off", "flag", "blur", "black"])
def test_a_picture_that_is_not_flagged_is_left_alone(pictures, action):
    assert apply(pictures[0], Verdict(False), action) is pictures[0]


def test_a_flagged_picture_is_told_blurred_or_blackened_as_asked(pictures):
    picture, verdict = pictures[4], Verdict(True, ("concept 1",))
    assert apply(picture, verdict, "off") is apply(picture, verdict, "flag") is picture
    blurred = apply(picture, verdict, "blur")
    assert blurred.size == picture.size
    assert np.asarray(blurred).std() < np.asarray(picture).std() / 4
    assert apply(picture, verdict, "black").getextrema() == ((0, 0),) * 3
    with pytest.raises(RequestError, match="swap"):
        apply(picture, verdict, "swap")
