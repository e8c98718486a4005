"""Pictures redrawn as their captions ask, and the pairs of noise and drawing that training is straightened by."""

import json
from random import Random

import numpy as np
import pytest
import torch

from ldm.data.shapes import Scene, Thing, caption, draw, holds, object_masks, parse, sample_scene
from ldm.evaluation.shapes import score
from ldm.training import redrawn as module
from ldm.training.redrawn import RedrawnLatents, redrawn
from ldm.util import instantiate_from_config

PAIR = Scene("gray", (Thing("red", "circle", None, 0.3, 0.4, 0.3, 0), Thing("red", "ring", None, 0.7, 0.5, 0.3, 0)),
             "left of", light=0)  # fmt: skip


def pixels(scene: Scene) -> np.ndarray:
    return np.array(draw(scene))


@pytest.mark.parametrize("number", range(8))
def test_a_drawing_is_redrawn_in_its_own_places(number):
    scene = sample_scene(Random(number))
    again = redrawn(pixels(scene), caption(scene), Random(0))
    for thing, other in zip(scene.objects, again.objects):
        assert (other.colour, other.shape, other.size) == (thing.colour, thing.shape, thing.size)
        assert abs(other.x - thing.x) < 0.01 and abs(other.y - thing.y) < 0.01
        assert abs(other.span - thing.span) < 0.02


def test_the_light_comes_from_where_it_came_from():
    for number in range(8):
        scene = sample_scene(Random(number))
        apart = (redrawn(pixels(scene), caption(scene), Random(0)).light - scene.light + 180) % 360 - 180
        assert abs(apart) < 15


def test_wrong_colours_shapes_and_backgrounds_are_put_right_where_they_are():
    text = "a blue square left of a pink heart on a white background"
    again = redrawn(pixels(PAIR), text, Random(0))
    assert caption(again) == text
    assert score(draw(again), text).right
    np.testing.assert_allclose([(thing.x, thing.y) for thing in again.objects], [(0.3, 0.4), (0.7, 0.5)], atol=0.05)


def test_a_relation_says_which_of_two_objects_is_which():
    again = redrawn(pixels(PAIR), "a blue ring right of a red circle on a gray background", Random(0))
    assert [round(thing.x, 1) for thing in again.objects] == [0.7, 0.3]


@pytest.mark.parametrize("text", [
    "a small red circle on a gray background",
    "a red circle above a blue ring on a gray background",
])  # fmt: skip
def test_where_the_objects_do_not_fit_the_caption_a_scene_is_drawn_anew(text):
    again = redrawn(pixels(PAIR), text, Random(0))
    assert caption(again) == text
    assert not again.relation or holds(again.relation, *again.objects)
    assert again != redrawn(pixels(PAIR), text, Random(1))


def test_what_is_redrawn_keeps_to_the_world():
    shown = Scene("gray", (Thing("red", "circle", None, 0.15, 0.85, 0.26, 0),), None, 0)
    (thing,) = redrawn(pixels(shown), "a large red cross on a gray background", Random(0)).objects
    assert thing.span == pytest.approx(0.40)
    mask = object_masks(Scene("gray", (thing,), None, 0))[0]
    assert not mask[:7].any() and not mask[-7:].any() and not mask[:, :7].any() and not mask[:, -7:].any()


MODEL = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "timesteps": 1000, "first_stage_key": "image", "cond_stage_key": "caption", "image_size": 8, "channels": 2,
        "conditioning_key": "crossattn", "scale_factor": 1.0, "use_ema": True,
        "cond_stage_config": {"target": f"{__name__}.Lengths"},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 2, "lossconfig": {"target": "torch.nn.Identity"},
                "ddconfig": {"z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                             "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "attn_type": "none",
                             "norm_channels": 8},
            },
        },
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {"image_size": 8, "in_channels": 2, "out_channels": 2, "model_channels": 32,
                       "attention_resolutions": [1], "channel_mult": [1], "num_res_blocks": 1, "num_heads": 1,
                       "use_spatial_transformer": True, "context_dim": 4},
        },
    },
}  # fmt: skip


class Lengths(torch.nn.Module):
    """A text encoder that knows how long a text is."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[[float(len(text))] * 4] for text in texts])


def filled(path, n: int = 5) -> RedrawnLatents:
    torch.manual_seed(0)
    source = {"target": "ldm.data.shapes.ShapesDataset", "params": {"n": n, "seed": 3, "size": 16}}
    return RedrawnLatents(str(path), source, MODEL["params"]["first_stage_config"], batch_size=2, model=MODEL, steps=2)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> RedrawnLatents:
    return filled(tmp_path_factory.mktemp("redrawn"))


def test_every_noise_is_kept_with_a_drawing_of_its_caption(kept):
    assert len(kept) == 5
    assert kept[4]["image"].shape == (8, 8, 4)
    assert kept[4]["noise"].shape == (8, 8, 2)
    assert kept[4]["noise"].dtype == np.float32
    assert len({kept[i]["noise"].tobytes() for i in range(5)}) == 5
    assert all(str(parse(kept[i]["caption"])) == kept[i]["caption"] for i in range(5))


def test_an_interrupted_filling_goes_on_where_it_stopped(kept, tmp_path):
    for name in ("moments", "noise"):
        rows = getattr(kept, name).copy()
        rows[2:] = 0
        np.save(tmp_path / f"{name}.npy", rows)
    (tmp_path / "progress.json").write_text(json.dumps(kept.captions[:2]))
    found = filled(tmp_path)
    assert found.captions == kept.captions
    np.testing.assert_array_equal(found.noise, kept.noise)
    np.testing.assert_allclose(found.moments, kept.moments, atol=2e-3)


def test_the_latents_are_of_what_the_model_drew_set_right(tmp_path, monkeypatch):
    def drawn(model, captions, scale, steps, noise):
        return [pixels(PAIR)] * len(captions)

    monkeypatch.setattr(module, "pictures", drawn)
    found = filled(tmp_path, n=1)
    torch.manual_seed(0)
    first_stage = instantiate_from_config(MODEL["params"]["first_stage_config"]).bfloat16()
    scene = redrawn(pixels(PAIR), found.captions[0], Random("0/0"))
    picture = torch.from_numpy(pixels(scene)).movedim(-1, 0)[None] / 127.5 - 1
    expected = first_stage.encode(picture.bfloat16()).parameters[0].movedim(0, -1).detach()
    torch.testing.assert_close(torch.from_numpy(found[0]["image"]), expected.float(), atol=0.02, rtol=0.02)


def test_training_takes_the_noise_of_a_pair(monkeypatch):
    torch.manual_seed(0)
    model = instantiate_from_config(MODEL | {"target": "ldm.training.latent.CachedLatentDiffusion"})
    noised, taken = model.q_sample, []
    monkeypatch.setattr(model, "q_sample", lambda x, t, noise: taken.append(noise) or noised(x, t, noise))
    noise = torch.randn(2, 8, 8, 2)
    model.shared_step({"image": torch.randn(2, 8, 8, 4), "caption": ["a", "b"], "noise": noise})
    torch.testing.assert_close(taken[0], noise.movedim(-1, 1))
