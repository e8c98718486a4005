import logging
from copy import deepcopy

import pytest
import torch

from ldm import sampling
from ldm.errors import NumericalError, RequestError
from ldm.generation import stages
from ldm.generation.inputs import Given
from ldm.generation.request import Request


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("inpaint", {}, "use scripts/inpaint.py with --init-img and --mask"),
        ("inpaint", {"init_img": "a.png"}, "use scripts/inpaint.py"),
        ("pairs", {}, "use scripts/inpaint.py"),
        ("edit", {"init_img": "a.png"}, "use scripts/edit.py with --init-img"),
        ("edit", {"image_scale": 1.5}, "use scripts/edit.py with --init-img"),
        ("edit", {"init_img": "a.png", "mask": "b.png", "image_scale": 1.5}, "edits a whole picture"),
        ("text", {"init_img": "a.png", "image_scale": 1.5}, "scripts/img2img.py, or name an InstructPix2Pix"),
        ("pairs", {"prompt": "a fox", "init_img": "a.png", "mask": "b.png"}, "no prompt: leave --prompt out"),
        ("classes", {}, "classes 0 to 10: use scripts/sample_diffusion.py --classes"),
        ("classes", {"class_label": 11}, "classes 0 to 10, got 11"),
        ("classes", {"class_label": -1}, "classes 0 to 10, got -1"),
        ("classes", {"class_label": 1, "prompt": "a fox"}, "no prompt: use scripts/sample_diffusion.py"),
        ("text", {"class_label": 1}, "no classes: leave --classes out"),
        ("unconditional", {"prompt": "a fox"}, "no prompt: use scripts/sample_diffusion.py"),
    ],
)
def test_a_request_that_a_model_cannot_draw_is_refused_with_what_would_work(pipeline, kind, settings, message):
    with pytest.raises(RequestError, match=message):
        stages.check(pipeline(kind).model, Request(**settings))


def test_a_model_that_does_not_look_at_depth_takes_no_depth_map(pipeline):
    with pytest.raises(RequestError, match="leave --depth-img out"):
        stages.check(pipeline("text").model, Request(init_img="photo.png", depth_img="depth.png"))


def test_blending_keeps_the_picture_at_its_level_of_noise_outside_the_mask():
    clean, x, noise = torch.randn(3, 1, 4, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    level = sampling.Level(t=500, alpha=0.6, sigma=0.8)
    blended = stages.blend(clean, x, mask, level, noise)
    torch.testing.assert_close(blended[..., 0, 0], x[..., 0, 0])
    torch.testing.assert_close(blended[..., 0, 1], (0.6 * clean + 0.8 * noise)[..., 0, 1])


def test_masked_latents_are_the_mask_and_the_picture_with_a_grey_hole(pipeline):
    model = pipeline("inpaint").model
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    concat = stages.masked_latents(model, [], Given(image, mask), (8, 8), None)["c_concat"][0]
    assert concat.shape == (1, 5, 8, 8)
    assert concat[0, 0].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 8
    hole = image.clone()
    hole[..., :16] = 0
    torch.testing.assert_close(concat[:, 1:], model.scale_factor * model.encode_first_stage(hole).mode())


def test_an_edit_is_told_its_picture_without_the_prompt_and_without_either_nothing_of_it(pipeline):
    model = pipeline("edit").model
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    request = Request("make it winter", "summer", init_img="a.png", scale=1.0, image_scale=1.5)
    told = stages.condition(model, [request] * 2, Given(image), (8, 8), 5, None).roles
    picture, prompt, negative = model.encode_first_stage(image).mode(), *map(
        model.get_learned_conditioning, (["make it winter"], ["summer"]))
    for cond, concat, cross in ((told.cond, picture, prompt), (told.image, picture, negative),
                                (told.uncond, 0 * picture, negative)):
        torch.testing.assert_close(cond, {"c_concat": [concat.expand(2, -1, -1, -1)],
                                          "c_crossattn": [cross.expand(2, -1, -1)]})


def test_the_latent_diffusion_inpainting_model_is_told_a_black_hole_and_a_mask_from_minus_1_to_1(pipeline):
    model = pipeline("pairs").model
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    concat = stages.concat_condition(model, Given(image, mask), count=2)
    assert concat.shape == (2, 5, 8, 8)
    assert concat[1, 4].tolist() == [[1, 1, 1, 1, -1, -1, -1, -1]] * 8
    hole = image.clone()
    hole[..., :16] = -1
    torch.testing.assert_close(concat[:1, :4], model.cond_stage_model.encode(hole))


def test_the_first_latent_of_a_picture_is_the_mean_and_draws_no_noise(pipeline):
    model = pipeline("text").model
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    state = torch.get_rng_state()
    latent = stages.first_latent(model, image)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(latent, model.scale_factor * model.encode_first_stage(image).mean)
    # An autoencoder with a codebook gives the latent itself.
    codes = pipeline("pairs").model
    torch.testing.assert_close(stages.first_latent(codes, image), codes.scale_factor * codes.encode_first_stage(image))


def test_decoding_gives_pixels_in_rows_and_refuses_what_is_not_finite(pipeline):
    model = pipeline("text").model
    latent = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(stages.decode(model, latent), model.decode_first_stage(latent)[0].permute(1, 2, 0))
    latent[0, 0, 0, 0] = torch.inf
    with pytest.raises(NumericalError, match="the latents are not finite"):
        stages.decode(model, latent)


@pytest.fixture
def overflowing(pipeline):
    """A model whose autoencoder passes 65504, but not by much, before a normalisation."""
    model = deepcopy(pipeline("text").model)
    for parameter in model.first_stage_model.decoder.conv_in.parameters():
        parameter.mul_(1e5)
    for parameter in model.first_stage_model.encoder.conv_in.parameters():
        parameter.mul_(1e5)
    return model


@pytest.mark.parametrize("way", ["half", "autocast"])
def test_an_overflow_of_half_precision_is_cured_in_float32_and_the_weights_stay_as_they_were(overflowing, caplog, way):
    latent = torch.randn(1, 4, 8, 8)
    wanted = stages.decode(overflowing, latent)
    if way == "half":
        overflowing.first_stage_model.half()
    dtypes = [parameter.dtype for parameter in overflowing.parameters()]
    with torch.autocast("cpu", dtype=torch.float16, enabled=way == "autocast"), caplog.at_level(logging.WARNING):
        got = stages.decode(overflowing, latent)
    assert caplog.messages == ["the autoencoder overflowed in half precision: running it again in float32"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.05)
    assert [parameter.dtype for parameter in overflowing.parameters()] == dtypes


def test_a_picture_is_encoded_again_in_float32_as_well(overflowing, caplog):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    wanted = stages.first_latent(overflowing, image)
    overflowing.first_stage_model.half()
    with caplog.at_level(logging.WARNING):
        got = stages.first_latent(overflowing, image)
    assert len(caplog.messages) == 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.05)


def test_an_autoencoder_that_gives_nothing_in_float32_either_is_an_error(pipeline):
    model = deepcopy(pipeline("text").model)
    model.first_stage_model.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NumericalError, match="the decoded picture is not finite"):
        stages.decode(model, torch.randn(1, 4, 8, 8))


def test_what_is_told_beside_a_prompt_joins_each_half_of_guidance_at_every_step():
    row, later = torch.ones(1, 2), stages.Condition(torch.ones(1, 3, 4), None)
    told = stages.Condition({"c_crossattn": [row], "c_adm": row}, torch.zeros(1, 3, 4), later={2: later})
    both = told.beside({"c_adm": 2 * row, "c_concat": [row]}, {"c_adm": 3 * row})
    assert both.positive["c_adm"].tolist() == [[1, 1, 2, 2]]
    assert both.positive["c_concat"] == [row] and both.positive["c_crossattn"] == [row]
    assert torch.equal(both.negative["c_adm"], 3 * row) and "c_concat" not in both.negative
    assert torch.equal(both.later[2].positive["c_adm"], 2 * row) and both.later[2].negative is None
    assert both.at(1) is both and both.at(2) is both.at(7) is both.later[2]
