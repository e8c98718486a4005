"""One batch of requests in, pictures out: every sampler with every kind of model."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import NumericalError, OutOfMemory, RequestError
from ldm.generation.noise import NoiseSource
from ldm.generation.pipeline import Picture, Pipeline
from ldm.generation.request import SAMPLERS, Request
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler

SMALL = {"width": 32, "height": 32, "steps": 3}
STARTS = {
    "txt2img": ("text", {}),
    "txt2img v": ("v", {}),
    "img2img": ("text", {"init_img": True, "strength": 0.7}),
    "inpaint": ("text", {"init_img": True, "mask": True, "strength": 0.7}),
    "inpaint from noise": ("text", {"init_img": True, "mask": True}),
    "inpaint 9 channels": ("inpaint", {"init_img": True, "mask": True}),
    "inpaint pairs": ("pairs", {"init_img": True, "mask": True, "scale": 1.0}),
    "unconditional": ("unconditional", {"scale": 1.0}),
    "classes": ("classes", {"class_label": 3, "scale": 3.0}),
}


def with_files(settings: dict, photo: str, mask: str) -> dict:
    """The settings of a start, with the pictures that it begins with."""
    return settings | {name: path for name, path in (("init_img", photo), ("mask", mask)) if settings.get(name)}


def noise(seed: int = 42):
    return NoiseSource(torch.device("cpu")).of([Request(seed=seed)])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_from_every_start_in_as_many_steps_as_its_path_has(pipeline, photo, mask, sampler, start):
    kind, settings = STARTS[start]
    request = Request(sampler=sampler, **SMALL, **with_files(settings, photo, mask))
    walked = []
    picture, = pipeline(kind).generate([request], noise(), lambda *latents: walked.append(latents[0].shape))
    assert walked == [(1, 4, 8, 8)] * (len(pipeline(kind).path(request).levels) - 1)
    assert picture.image.size == (32, 32)
    drawn = np.asarray(picture.image)
    assert drawn.std() > 1
    if request.mask:
        assert np.array_equal(drawn[:, 16:], np.asarray(Image.open(photo))[:, 16:])


def test_guidance_in_an_interval_counts_at_its_levels_alone(pipeline):
    text, plain = pipeline("text"), Request(sampler="ddim", **SMALL)

    def walk(request: Request) -> list[torch.Tensor]:
        latents = []
        text.generate([request], noise(), lambda x, x0: latents.append(x.clone()))
        return latents

    middle = text.path(plain).levels[1].edm_sigma
    guided, unguided = walk(plain), walk(replace(plain, scale=1.0))
    between = walk(replace(plain, guidance_interval=f"{0.9 * middle},{1.1 * middle}"))
    assert [one.equal(other) for one, other in zip(between, unguided)] == [True, False, False]
    assert not between[1].equal(guided[1])
    assert walk(replace(plain, guidance_interval="0,inf"))[-1].equal(guided[-1])


def test_pixels_are_merged_where_that_is_asked_for_and_it_is_said_where_none_can_be(draw, monkeypatch, caplog):
    request = Request(prompt="a fox", **SMALL)
    plain, = draw("text", request)
    same, = draw("text", replace(request, token_merging=0.5))
    assert "--token_merging changed nothing" in caplog.text
    caplog.clear()
    monkeypatch.setattr("ldm.modules.merging.FEWEST", 1)
    merged, = draw("text", replace(request, token_merging=0.5))
    assert np.array_equal(same, plain)
    assert not np.array_equal(merged, plain)
    assert not caplog.text


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_the_order_and_the_method_of_dpm_solver_reach_it(draw, order, method):
    settings = {"sampler": "dpm_solver", **SMALL, "steps": 6}
    drawn, = draw("text", Request(solver_order=order, solver_method=method, **settings))
    default, = draw("text", Request(**settings))
    assert np.array_equal(drawn, default) == ((order, method) == (2, "multistep"))


@pytest.mark.parametrize(
    ("sampler", "old", "eta"), [("plms", PLMSSampler, 0), ("ddim", DDIMSampler, 1), ("dpm_solver", DPMSolverSampler, 0)]
)
@pytest.mark.parametrize("kind", ["text", "v"])
def test_two_batches_of_a_run_are_those_of_the_old_sampler_classes(pipeline, sampler, old, eta, kind):
    model = pipeline(kind).model
    request = Request(prompt="a fox", negative_prompt="snow", sampler=sampler, eta=eta, seed=5, **SMALL)
    drawing = noise(5)
    torch.manual_seed(5)
    for _ in range(2):
        pictures = pipeline(kind).generate([request] * 2, drawing)
        with torch.no_grad():
            fox, snow = (model.get_learned_conditioning([text] * 2) for text in ("a fox", "snow"))
            latents, _ = old(model).sample(3, 2, (4, 8, 8), fox, eta=eta, verbose=False,
                                           unconditional_guidance_scale=7.5, unconditional_conditioning=snow)
            decoded = (255 * ((model.decode_first_stage(latents) + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1)
        for picture, wanted in zip(pictures, decoded.numpy().astype(np.uint8), strict=True):
            assert np.abs(np.asarray(picture.image).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_original_img2img_is_the_tail_of_ddim(pipeline, photo, layout):
    request = Request(prompt="a fox", sampler="ddim", init_img=photo, strength=0.6, steps=10, scale=5.0, seed=3)
    model = deepcopy(pipeline("text").model).to(memory_format=layout)
    picture, = Pipeline(model, pipeline("text").geometry).generate([request], noise(3))
    sampler = DDIMSampler(model)
    image = torch.from_numpy(np.asarray(Image.open(photo)).astype(np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    sampler.make_schedule(10, verbose=False)
    torch.manual_seed(3)
    with torch.no_grad():
        clean = model.get_first_stage_encoding(model.encode_first_stage(image).mode())
        noised = sampler.stochastic_encode(clean, torch.tensor([6]))
        prompt, nothing = (model.get_learned_conditioning([text]) for text in ("a fox", ""))
        latent = sampler.decode(noised, prompt, 6, unconditional_guidance_scale=5.0, unconditional_conditioning=nothing)
        wanted = (255 * ((model.decode_first_stage(latent) + 1) / 2).clamp(0, 1))[0].permute(1, 2, 0)
    assert np.abs(np.asarray(picture.image).astype(int) - wanted.numpy().astype(np.uint8)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_a_picture_with_a_seed_of_its_own_is_the_same_alone_and_among_others(draw, sampler):
    own = {"seed_mode": "image", "sampler": sampler, **SMALL}
    requests = [Request(prompt=f"fox {seed}", seed=seed, **own) for seed in (4, 5)]
    together, alone = draw("text", *requests)[1], draw("text", requests[1])[0]
    assert np.abs(together.astype(int) - alone).max() <= 1


def test_the_prompts_of_a_batch_are_drawn_each_by_itself(draw):
    fox, hare = (Request(prompt=text, seed_mode="image", **SMALL) for text in ("a fox", "a hare"))
    first, second = draw("text", fox, hare)
    assert not np.array_equal(first, second)
    assert np.abs(first.astype(int) - draw("text", fox)[0]).max() <= 1
    assert np.abs(second.astype(int) - draw("text", hare)[0]).max() <= 1


def test_scale_1_is_no_guidance_and_0_is_the_negative_prompt_alone(draw):
    def drawn(prompt, negative, scale):
        return draw("text", Request(prompt=prompt, negative_prompt=negative, scale=scale, sampler="ddim", **SMALL))[0]

    assert np.array_equal(drawn("a fox", "snow", 1.0), drawn("a fox", "", 1.0))
    assert np.abs(drawn("a fox", "snow", 0.0).astype(int) - drawn("snow", "", 1.0)).max() <= 1


def test_the_classes_of_a_batch_are_drawn_each_by_itself(draw):
    one, seven = (Request(class_label=label, seed_mode="image", scale=3.0, **SMALL) for label in (1, 7))
    first, second = draw("classes", one, seven)
    assert not np.array_equal(first, second)
    assert np.abs(second.astype(int) - draw("classes", seven)[0]).max() <= 1


def test_outside_the_mask_an_ordinary_model_sees_the_picture_at_every_step(pipeline, photo, mask):
    seen = []
    pipe = pipeline("text")
    request = Request(init_img=photo, mask=mask, sampler="ddim", **SMALL)
    pipe.generate([request], noise(), lambda *latents: seen.append(latents[0].clone()))
    image = torch.from_numpy(np.asarray(Image.open(photo)).astype(np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    with torch.no_grad():
        clean = pipe.model.get_first_stage_encoding(pipe.model.encode_first_stage(image).mode())
    for latent, level in zip(seen[:-1], pipe.path(request).levels[1:-1]):
        left_over = (latent - level.alpha * clean)[..., 4:] / level.sigma
        assert 0.7 < left_over.std() < 1.3  # noise alone, as much of it as the level says


def test_one_picture_that_comes_to_nothing_leaves_the_others_of_its_batch(pipeline):
    def spoil(x, *others):
        x[1] = float("nan")

    requests = [Request(prompt=prompt, **SMALL) for prompt in ("a fox", "a hare", "a stag")]
    first, second, third = pipeline("text").generate(requests, noise(), spoil)
    assert isinstance(second, NumericalError)
    assert "--precision full" in str(second)
    assert [type(one) for one in (first, third)] == [Picture, Picture]
    assert third.request.prompt == "a stag"


@pytest.mark.parametrize(("kind", "settings"), STARTS.values(), ids=STARTS)
def test_what_can_be_drawn_passes_the_check(pipeline, photo, mask, kind, settings):
    pipeline(kind).check(Request(**with_files(settings, photo, mask)))


def test_more_than_memory_holds_is_said_as_such(pipeline):
    request = Request(width=1_600_000, height=1_600_000)
    with pytest.raises(OutOfMemory, match="not enough memory on cpu for a batch of 2 at 1600000x1600000"):
        pipeline("text").generate([request, replace(request, prompt="a fox")], noise())


def test_a_side_that_the_model_cannot_halve_is_refused(pipeline):
    with pytest.raises(RequestError, match="W must be a positive multiple of 16, got 40"):
        pipeline("text").generate([Request(width=40)], noise())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_seed_of_its_own_gives_the_same_picture_on_a_gpu(pipeline, draw):
    from copy import deepcopy

    request = Request(prompt="a fox", seed_mode="image", sampler="ddim", **SMALL)
    on_cpu, = draw("text", request)
    pipe = pipeline("text")
    moved = type(pipe)(deepcopy(pipe.model).cuda(), pipe.geometry)
    picture, = moved.generate([request], NoiseSource(torch.device("cuda")).of([request]))
    assert np.abs(np.asarray(picture.image).astype(int) - on_cpu).max() <= 2
