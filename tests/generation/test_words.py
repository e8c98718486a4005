"""Prompts on their way to the network: what `apply_model` is told, and when."""

from dataclasses import asdict, replace

import fill
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support import GOLDENS
from tiny import KINDS

from ldm import sampling
from ldm.errors import RequestError
from ldm.generation.geometry import geometry
from ldm.generation.noise import NoiseSource
from ldm.generation.pipeline import Pipeline
from ldm.generation.request import SAMPLERS, Request
from ldm.generation.words import Words
from ldm.util import instantiate_from_config


class Network:
    """Stands in for `apply_model`: sees no noise in any latent, and remembers what it was told."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        self.calls.append((t[0].item(), cond))
        return torch.zeros_like(x)


def pipeline_of(kind):
    golden, params = KINDS[kind]
    config = OmegaConf.load(GOLDENS / f"{golden}.yaml")
    for name, value in params.items():
        OmegaConf.update(config.model.params, name, value, merge=False)
    model = fill.fill_module(instantiate_from_config(config.model).eval(), salt=0)
    return Pipeline(model, geometry(config.model))


@pytest.fixture(scope="module")
def plain():
    return pipeline_of("text")


@pytest.fixture
def network(plain, monkeypatch):
    network = Network()
    monkeypatch.setattr(plain.model, "apply_model", network)
    return network


def draw(pipeline, *batch, on_step=lambda x, x0: None):
    return pipeline.generate(batch, NoiseSource(torch.device("cpu")).of(batch), on_step)


def states(pipeline, text):
    return pipeline.model.get_learned_conditioning([text])


BASE = Request(prompt="a fox", sampler="ddim", steps=4, scale=1.0, width=32, height=32, prompt_weights=True)


def test_without_prompt_weights_brackets_are_text_like_any_other(plain, network):
    prompt = "a (fox:1.3) and [hare:owl:2]"
    draw(plain, replace(BASE, prompt=prompt, prompt_weights=False))
    assert len(network.calls) == 4
    assert all(cond.equal(states(plain, prompt)) for _, cond in network.calls)


def test_each_step_is_told_its_text(plain, network):
    draw(plain, replace(BASE, prompt="a [fox:hare:0.5] runs"))
    want = [states(plain, "a fox runs")] * 2 + [states(plain, "a hare runs")] * 2
    assert len(network.calls) == 4
    assert all(cond.equal(told) for (_, cond), told in zip(network.calls, want))


def test_a_batch_has_a_script_for_each_picture_and_for_what_each_steers_away_from(plain, network):
    first = replace(BASE, prompt="[fox|hare]", negative_prompt="(snow:1.2)", scale=5.0)
    second = replace(BASE, prompt="hill", negative_prompt="[:sun:3]", scale=5.0)
    draw(plain, first, second)
    weighed = plain.model.cond_stage_model.weigh(states(plain, "snow"), [("snow", 1.2)])
    fox, hare, hill, sun, nothing = (states(plain, text) for text in ("fox", "hare", "hill", "sun", ""))
    want = [
        [weighed, nothing, fox, hill], [weighed, nothing, hare, hill],
        [weighed, nothing, fox, hill], [weighed, sun, hare, hill],
    ]  # fmt: skip
    assert len(network.calls) == 4
    assert all(cond.equal(torch.cat(told)) for (_, cond), told in zip(network.calls, want))


def test_each_distinct_text_is_encoded_once(plain, network, monkeypatch):
    monkeypatch.setattr(plain, "known", {})
    encoded = []
    encode = plain.model.cond_stage_model.encode
    monkeypatch.setattr(plain.model.cond_stage_model, "encode", lambda texts: encoded.extend(texts) or encode(texts))
    first = replace(BASE, prompt="[fox|hare]", scale=5.0)
    draw(plain, first, replace(first, prompt="fox"), replace(first, prompt="[fox:owl:3]"))
    assert sorted(encoded) == ["", "fox", "hare", "owl"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_stays_with_its_text_however_often_it_asks(plain, network, sampler):
    marks = []
    request = replace(BASE, prompt="[fox|hare|owl|hill]", sampler=sampler)
    draw(plain, request, on_step=lambda x, x0: marks.append(len(network.calls)))
    assert len(marks) == 4
    for text, start, end in zip(["fox", "hare", "owl", "hill"], [0, *marks], marks):
        assert end > start
        assert all(cond.equal(states(plain, text)) for _, cond in network.calls[start:end])


def test_samplers_that_ask_twice_a_step_do(plain, network):
    """What the test above rests on."""
    counts = {}
    for sampler in ("ddim", "plms", "heun", "dpm2", "dpmpp_sde", "dpmpp_2s_a"):
        network.calls.clear()
        draw(plain, replace(BASE, sampler=sampler))
        counts[sampler] = len(network.calls)
    assert counts == {"ddim": 4, "plms": 5, "heun": 7, "dpm2": 7, "dpmpp_sde": 7, "dpmpp_2s_a": 7}


def test_a_share_is_one_of_the_steps_that_are_walked(plain, network, tmp_path):
    picture = tmp_path / "start.png"
    plain_request = replace(BASE, steps=8, prompt="[fox:hare:0.5]")
    drawn, = draw(plain, plain_request)
    drawn.image.save(picture)
    network.calls.clear()
    draw(plain, replace(plain_request, init_img=str(picture), strength=0.5))
    assert [cond.equal(states(plain, "fox")) for _, cond in network.calls] == [True, True, False, False]


def test_beside_a_picture_only_the_words_change(tmp_path, monkeypatch):
    pipeline, network = pipeline_of("inpaint"), Network()
    monkeypatch.setattr(pipeline.model, "apply_model", network)
    encoded = []
    encode = pipeline.model.encode_first_stage
    monkeypatch.setattr(pipeline.model, "encode_first_stage", lambda image: encoded.append(1) or encode(image))
    for name, colour in (("photo", 128), ("mask", 255)):
        Image.new("L", (32, 32), colour).save(tmp_path / f"{name}.png")
    paths = {"init_img": str(tmp_path / "photo.png"), "mask": str(tmp_path / "mask.png")}
    draw(pipeline, replace(BASE, prompt="[fox|hare]", negative_prompt="snow", scale=2.0, strength=1.0, **paths))
    assert len(encoded) == 1
    for step, (_, cond) in enumerate(network.calls):
        want = [states(pipeline, "snow"), states(pipeline, ["fox", "hare"][step % 2])]
        assert cond["c_crossattn"][0].equal(torch.cat(want))
        assert cond["c_concat"][0].equal(network.calls[0][1]["c_concat"][0])


def test_one_text_for_all_steps_draws_what_the_samplers_draw_without_it(plain):
    request = replace(BASE, scale=3.0, negative_prompt="snow")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    denoise = sampling.denoiser(
        plain.model.apply_model, plain.model.parameterization, states(plain, "a fox"), states(plain, "snow"), 3.0
    )
    levels = sampling.levels(plain.schedule, "ddim", 4)
    with torch.inference_mode():
        *_, want = sampling.SAMPLERS["ddim"](denoise, x, levels, plain.schedule)
    latents = []
    draw(plain, request, on_step=lambda x, x0: latents.append(x.clone()))
    assert latents[-1].equal(want)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_states_of_a_text_do_not_depend_on_its_neighbours(plain, count):
    texts = ["a (fox:1.3)", "hare", "owl"][:count]
    assert Words(plain.model, texts, BASE)(texts)[0].equal(Words(plain.model, texts[:1], BASE)(texts[:1])[0])


def test_chunks_are_weighed_too_and_all_have_as_many_as_the_longest(plain):
    long = " ".join(["!"] * 80)
    request = replace(BASE, long_prompt="chunk")
    words = Words(plain.model, [f"{long} (fox:1.3)", "hill"], request)
    encoder = plain.model.cond_stage_model
    both = words([f"{long} (fox:1.3)", "hill"])
    assert both.shape == (2, 154, 64)
    assert both[1:].equal(encoder.encode_long(["hill"], 2))
    read = [(f"{long} ", 1.0), ("fox", 1.3)]
    assert both[:1].equal(encoder.weigh(encoder.encode_long([f"{long}  fox"], 2), read, 2))
    assert both[:1, :77].equal(encoder.encode_long([f"{long}  fox"], 2)[:, :77])


def test_the_words_that_did_not_fit_are_told_without_their_brackets(plain, network):
    long = " ".join(["!"] * 75)
    first, second = draw(plain, replace(BASE, prompt=f"{long} [a:a red:2] (fox:1.2)"), BASE)
    assert (first.cut.split(), second.cut) == (["a", "red", "fox"], "")


def test_an_encoder_that_cannot_weigh_says_so():
    pipeline = pipeline_of("text")
    pipeline.model.cond_stage_model = torch.nn.Identity()
    with pytest.raises(RequestError, match=r"Identity cannot weigh words: leave --prompt_weights out"):
        Words(pipeline.model, ["a (fox)"], BASE)
    assert Words(pipeline.model, ["a fox"], BASE).cut("a fox") == ""


def test_the_record_of_a_request_says_how_its_prompt_was_read():
    assert asdict(BASE)["prompt_weights"] is True
    assert Request.from_record(asdict(BASE)) == BASE
    old = {name: value for name, value in asdict(BASE).items() if name != "prompt_weights"}
    assert Request.from_record(old) == replace(BASE, prompt_weights=False)
