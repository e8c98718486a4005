import pytest
import torch
from torch import nn

from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.images import rows_of, tensor_grid

QUICK = {"ddim_steps": 5, "plot_progressive_rows": False, "inpaint": False, "plot_diffusion_rows": False}


class Texts(nn.Module):
    def encode(self, texts):
        return torch.tensor([[[float(len(text))] * 8] for text in texts])


class Constant(nn.Module):
    """A network that points at the first number of its context everywhere."""

    def forward(self, x, timesteps=None, context=None, y=None):
        return torch.zeros_like(x) + context[:, :1, :1, None]


@pytest.fixture
def model(small_model):
    model = small_model(parameterization="x0")
    model.model.diffusion_model = Constant()
    model.cond_stage_model = Texts()
    return model.eval()


@pytest.fixture
def texts(batch):
    return batch | {"txt": ["a", "abc"]}


def test_a_grid_puts_pictures_row_by_row_with_a_border():
    pictures = torch.arange(1.0, 4.0).reshape(3, 1, 1, 1).expand(3, 2, 2, 3)
    grid = tensor_grid(pictures, columns=2)
    assert grid.shape == (2, 3 * 2 + 2 * 2, 3 * 2 + 2 * 3)
    assert (grid[0, 2, 2], grid[1, 2, 7], grid[0, 6, 2], grid[0, 6, 7]) == (1.0, 2.0, 3.0, 0.0)
    assert grid[:, :2].abs().max() == grid[:, -2:].abs().max() == grid[:, :, -2:].abs().max() == 0.0
    assert grid.sum() == pictures.sum()


def test_rows_hold_the_stages_of_one_picture():
    stages = [torch.full((2, 1, 1, 1), 1.0), torch.full((2, 1, 1, 1), 2.0)]
    stages[0][1], stages[1][1] = 3.0, 4.0
    assert rows_of(stages)[0, 2::3, 2::3].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_everything_is_logged_that_is_asked_for(model, texts):
    log = model.log_images(texts, ddim_steps=5, plot_denoise_rows=True, unconditional_guidance_scale=2.0,
                           unconditional_guidance_label="")  # fmt: skip
    assert set(log) == {
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "denoise_row", "samples_cfg_scale_2.00",
        "samples_inpainting", "samples_outpainting", "mask", "progressive_row",
    }  # fmt: skip
    assert log["conditioning"].shape == (2, 3, 8, 8)
    assert log["diffusion_row"].shape == (4, 2 * 8 + 3 * 2, 3 * 8 + 4 * 2)  # t = 0, 5, 9


def test_samples_follow_their_condition_and_guidance_goes_beyond_it(model, texts):
    log = model.log_images(texts, unconditional_guidance_scale=3.0, unconditional_guidance_label="abcd", **QUICK)
    wanted = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    guided = 4.0 + 3.0 * (wanted - 4.0)
    for name, value in (("samples", wanted), ("samples_cfg_scale_3.00", guided)):
        means = log[name].mean(dim=(1, 2, 3), keepdim=True)
        torch.testing.assert_close(means, value, atol=0.05, rtol=0)


def test_inpainting_redraws_the_middle_and_outpainting_what_is_around(model, texts):
    model.register_schedule(timesteps=10, linear_start=1e-8, linear_end=1e-2)
    log = model.log_images(texts, ddim_steps=None, sample=False, plot_progressive_rows=False)
    x, middle = log["inputs"], (..., slice(2, 6), slice(2, 6))
    assert log["mask"][middle].sum() == 0
    assert log["mask"].sum() == 2 * (64 - 16)
    torch.testing.assert_close(log["samples_inpainting"][1][middle], torch.full((4, 4, 4), 3.0))
    torch.testing.assert_close(log["samples_inpainting"][..., :2], x[..., :2], atol=1e-2, rtol=0)
    torch.testing.assert_close(log["samples_outpainting"][middle], x[middle], atol=1e-2, rtol=0)


def test_no_more_pictures_are_logged_than_asked_for(model, texts):
    assert len(model.log_images(texts, N=1, **QUICK)["samples"]) == 1


def test_single_entries_can_be_asked_for(model, texts):
    assert set(model.log_images(texts, return_keys=["samples", "nothing"], **QUICK)) == {"samples"}
    assert "inputs" in model.log_images(texts, return_keys=["nothing"], **QUICK)


def test_pictures_come_from_the_averaged_weights(small_model, batch):
    model = small_model(use_ema=True, parameterization="x0").eval()
    output = model.model.diffusion_model.out[2]
    with torch.no_grad():
        output.bias.fill_(1.0)
    options = QUICK | {"ddim_steps": None}
    averaged = model.log_images(batch, **options)["samples"]
    torch.testing.assert_close(averaged, torch.zeros_like(averaged))
    trained = model.log_images(batch, use_ema_scope=False, **options)["samples"]
    torch.testing.assert_close(trained, torch.ones_like(trained))


@pytest.mark.parametrize("key, batch_part, name, channels", [
    ("class_label", {"human_label": ["a cat", "a dog"]}, "conditioning", 3),
    ("sketch", {"sketch": torch.zeros(2, 8, 8, 3)}, "conditioning", 3),
    ("segmentation", {"segmentation": torch.randn(2, 8, 8, 7)}, "original_conditioning", 3),
])  # fmt: skip
def test_conditions_are_shown_as_pictures(model, batch, key, batch_part, name, channels):
    model.cond_stage_key = key
    raw = model.raw_condition(batch | batch_part, key, torch.zeros(2, 4, 8, 8))
    pictures = model.condition_images(batch | batch_part, None, raw, torch.zeros(2, 4, 8, 8))
    assert list(pictures) == [name]
    assert pictures[name].shape == (2, channels, 8, 8)
    assert pictures[name].abs().max() <= 1.0


def test_conditions_that_are_no_pictures_are_not_shown(small_model, batch):
    assert small_model().condition_images(batch, batch["txt"], batch["txt"], torch.zeros(2, 4, 8, 8)) == {}


def test_a_map_keeps_its_colours_from_one_log_to_the_next(model):
    x = torch.randn(1, 7, 8, 8)
    torch.testing.assert_close(model.to_rgb(x), model.to_rgb(x), rtol=0, atol=0)
    assert (model.to_rgb(x).min(), model.to_rgb(x).max()) == (-1.0, 1.0)


def test_a_model_of_pixels_logs_its_pictures_too():
    model = DDPM({"target": "torch.nn.Identity"}, timesteps=6, image_size=4, use_ema=False, log_every_t=3)

    class Zero(nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    model.model.diffusion_model = Zero()
    log = model.log_images({"image": torch.zeros(3, 4, 4, 3)}, N=2)
    assert {key: tuple(value.shape) for key, value in log.items()} == {
        "inputs": (2, 3, 4, 4),
        "diffusion_row": (3, 2 * 4 + 3 * 2, 3 * 4 + 4 * 2),
        "samples": (2, 3, 4, 4),
        "denoise_row": (3, 2 * 4 + 3 * 2, 4 * 4 + 5 * 2),
    }


def test_samples_of_a_vq_model_come_quantized_as_well(batch):
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {
        "embed_dim": 3, "n_embed": 16, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}}  # fmt: skip
    unet = {"target": "torch.nn.Identity"}
    model = LatentDiffusion(stage, "__is_unconditional__", unet_config=unet, timesteps=6, image_size=4, use_ema=False)

    class Half(nn.Module):
        def forward(self, x, t):
            return 0.5 * x

    model.model.diffusion_model = Half()
    log = model.log_images({"image": torch.zeros(2, 8, 8, 3)}, **{**QUICK, "ddim_steps": 3})
    assert log["samples_x0_quantized"].shape == (2, 3, 8, 8)
    assert "conditioning" not in log
