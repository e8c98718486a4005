"""Several encoders as one condition, as Stable Diffusion XL has them."""

import json

import fill
import pytest
import torch
from support import GOLDENS

from ldm.errors import ConfigError
from ldm.modules.encoders.modules import ConcatTimestepEmbedderND, FrozenOpenCLIPEmbedder2, GeneralConditioner
from ldm.prompt import parse_weights

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "hidden_act": "gelu", "projection_dim": 16}  # fmt: skip
LONG = "a red bench on a hill, " * 20


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder that describes a tiny text tower."""
    folder = tmp_path_factory.mktemp("tower")
    (folder / "config.json").write_text(json.dumps(TOWER))
    return str(folder)


def config(name: str, key: str, **params) -> dict:
    return {"target": f"sgm.modules.encoders.modules.{name}", "input_key": key, "params": params}


@pytest.fixture(scope="module")
def both(tower):
    """A conditioner of the base's form: two text encoders, and two sizes."""
    return fill.fill_module(GeneralConditioner([
        config("FrozenCLIPEmbedder", "txt", version=str(GOLDENS / "tiny-clip"), layer="hidden", layer_idx=1),
        config("FrozenOpenCLIPEmbedder2", "txt", arch=tower, layer="penultimate", legacy=False,
               always_return_pooled=True),
        config("ConcatTimestepEmbedderND", "original_size_as_tuple", outdim=8),
        config("ConcatTimestepEmbedderND", "crop_coords_top_left", outdim=8),
    ]), salt=0).eval()  # fmt: skip


def test_numbers_become_cosines_then_sines_each_by_itself():
    told = ConcatTimestepEmbedderND(4)(torch.tensor([[1.0, 3.0]]))
    angles = torch.tensor([1.0, 0.01])
    want = torch.cat([wave(number * angles) for number in (1, 3) for wave in (torch.cos, torch.sin)])
    torch.testing.assert_close(told, want[None])


def test_states_are_joined_by_channel_and_vectors_come_in_the_order_of_the_encoders(both):
    first, second = both.texts
    batch = {"txt": ["a fox"], "original_size_as_tuple": torch.tensor([[64.0, 32.0]]),
             "crop_coords_top_left": torch.tensor([[0.0, 0.0]])}  # fmt: skip
    told = both(batch)
    states, pooled = second(["a fox"])
    assert torch.equal(told["c_crossattn"][0], torch.cat([first(["a fox"]), states], dim=-1))
    assert told["c_adm"].shape == (1, 16 + 2 * 8 + 2 * 8)
    assert torch.equal(told["c_adm"][:, :16], pooled)
    values = {"original_size_as_tuple": (64, 32), "crop_coords_top_left": (0, 0)}
    assert torch.equal(told["c_adm"][:, 16:], both.measure(values))
    assert both.measures == list(values)
    assert torch.equal(both.encode(["a fox"])["c_adm"], pooled)


def test_a_short_prompt_in_chunks_is_the_same_as_without(both):
    plain, long = both.encode(["a fox"]), both.encode_long(["a fox"])
    torch.testing.assert_close(long["c_crossattn"][0], plain["c_crossattn"][0])
    torch.testing.assert_close(long["c_adm"], plain["c_adm"])


def test_the_vector_of_a_long_prompt_is_that_of_its_first_chunk(both):
    count = len(both.chunks(LONG))
    told = both.encode_long([LONG])
    assert count > 1 and told["c_crossattn"][0].shape[1] == 77 * count
    first = both.texts[1].chunk_ids([LONG])[:1]
    torch.testing.assert_close(told["c_adm"], both.texts[1].encode_ids(first)[1])


def test_what_is_cut_is_told_once(both, caplog):
    told = both.encode([LONG])
    assert told["c_crossattn"][0].shape[1] == 77
    assert caplog.text.count("this was dropped") == 1
    assert both.dropped(LONG) and not both.dropped("a fox")


def test_words_are_weighed_in_each_encoder_by_itself_and_the_vector_stays(both):
    prompt = parse_weights("a (red:1.5) fox")
    plain = both.encode(["a red fox"])
    weighed = both.weigh(plain, prompt)
    parts = plain["c_crossattn"][0].split([one.width for one in both.texts], dim=-1)
    want = torch.cat([one.weigh(part, prompt) for one, part in zip(both.texts, parts)], dim=-1)
    assert torch.equal(weighed["c_crossattn"][0], want)
    assert not torch.equal(want, plain["c_crossattn"][0])
    assert torch.equal(weighed["c_adm"], plain["c_adm"])


def test_no_text_is_zeros_for_two_encoders_and_the_empty_text_for_one(both, tower):
    zeros = both.nothing(both.encode([""]))
    assert both.zero_empty and not zeros["c_adm"].any() and not zeros["c_crossattn"][0].any()
    one = [config("FrozenOpenCLIPEmbedder2", "txt", arch=tower, legacy=False, always_return_pooled=True)]
    assert not GeneralConditioner(one).zero_empty
    assert GeneralConditioner(one, zero_empty=True).zero_empty


def test_a_device_set_from_outside_holds_for_every_encoder(both):
    tower = GeneralConditioner([config("ConcatTimestepEmbedderND", "crop", outdim=4)])
    tower.device = "meta"
    assert tower.device.type == tower.embedders[0].device.type == tower.measure({"crop": (1, 2)}).device.type == "meta"
    assert both.device.type == "cpu"


def test_an_encoder_without_an_input_key_or_with_settings_that_exclude_each_other_is_refused(tower):
    with pytest.raises(ConfigError, match=r"input_key.*Identity"):
        GeneralConditioner([{"target": "torch.nn.Identity"}])
    with pytest.raises(ConfigError, match="legacy"):
        FrozenOpenCLIPEmbedder2(tower, always_return_pooled=True)


def test_the_legacy_form_is_the_encoder_of_version_2(tower):
    old = fill.fill_module(FrozenOpenCLIPEmbedder2(tower, layer="penultimate"), salt=0)
    ids = old.ids(["a fox"])
    assert torch.equal(old(["a fox"]), old.model.text_states(ids, skip=1))
    old.legacy = False
    assert torch.equal(old(["a fox"]), old.model.text_features(ids, skip=1)[0])
