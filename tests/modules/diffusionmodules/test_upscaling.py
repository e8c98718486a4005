import torch
from support import manifest

from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation, SimpleImageConcat

SCHEDULE = {"linear_start": 0.0001, "linear_end": 0.02}


def test_the_buffers_are_those_of_the_published_upscaler():
    prefix = "low_scale_model."
    wanted = {key: shape for key, (shape, _) in manifest("sd-x4-upscaler").items() if key.startswith(prefix)}
    state = ImageConcatWithNoiseAugmentation(SCHEDULE).state_dict(prefix=prefix)
    assert {key: tuple(values.shape) for key, values in state.items()} == wanted


def test_a_picture_is_noised_to_the_level_it_is_given():
    model, x = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=350), torch.full((2, 3, 64, 64), 0.5)
    noised, level = model(x, noise_level=torch.tensor([0, 900]))
    kept = model.alphas_cumprod[level]
    assert level.tolist() == [0, 900]
    torch.testing.assert_close(noised.mean(dim=(1, 2, 3)), 0.5 * kept**0.5, atol=0.05, rtol=0)
    torch.testing.assert_close(noised.std(dim=(1, 2, 3)), (1 - kept) ** 0.5, atol=0.05, rtol=0)


def test_levels_are_drawn_below_the_highest():
    _, level = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=3)(torch.zeros(64, 3, 1, 1))
    assert level.dtype == torch.int64
    assert set(level.tolist()) == {0, 1, 2}


def test_the_schedule_is_real_on_meta_and_keeps_float32():
    with torch.device("meta"):
        model = ImageConcatWithNoiseAugmentation(SCHEDULE)
    model.to(torch.bfloat16)
    assert model.alphas_cumprod.device.type == "cpu"
    assert model.alphas_cumprod.dtype == torch.float32
    assert 0.9998 < model.alphas_cumprod[0] < 1


def test_without_noise_the_picture_passes_at_level_zero():
    x = torch.randn(2, 3, 4, 4)
    passed, level = SimpleImageConcat()(x)
    assert passed is x
    assert level.tolist() == [0, 0]
