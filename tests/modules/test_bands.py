"""Layers in bands give what whole layers give."""

import pytest
import torch
from torch import nn

from ldm.modules.bands import NormOf, in_bands, set_band
from ldm.modules.diffusionmodules.model import Decoder, Downsample, Encoder, ResnetBlock, Upsample


@pytest.fixture
def narrow():
    """A function that runs another in bands of so few entries that every layer is cut."""
    def run(layer, *inputs, entries=200):
        previous = set_band(entries)
        try:
            with torch.no_grad():
                return layer(*inputs)
        finally:
            set_band(previous)

    return run


def lively(module):
    """Weights, also those of normalisations, of which none is 0 or 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return module.eval()


def steep(*shape):
    """Noise whose level rises from the top to the bottom, so that no band has the mean of the whole."""
    return torch.randn(*shape) + torch.linspace(-3, 3, shape[2])[:, None]


LAYERS = {
    "block": (lambda: ResnetBlock(in_channels=32, out_channels=64, dropout=0.0, temb_channels=0), 32),
    "same": (lambda: ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0), 32),
    "shortcut": (lambda: ResnetBlock(
        in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0, temb_channels=0), 32),
    "up": (lambda: Upsample(5, True), 5),
    "plain up": (lambda: Upsample(5, False), 5),
    "down": (lambda: Downsample(5, True), 5),
    "plain down": (lambda: Downsample(5, False), 5),
}  # fmt: skip


@pytest.mark.parametrize("height", [16, 18, 31])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_bands_gives_what_it_gives_of_the_whole(name, height, narrow):
    build, channels = LAYERS[name]
    layer, x = lively(build()), steep(2, channels, height, 6)
    torch.testing.assert_close(narrow(layer, x), layer(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bands_keep_the_layout_of_the_whole(layout, narrow):
    layer = lively(nn.Conv2d(5, 7, 3, padding=1)).to(memory_format=layout)
    x = torch.randn(2, 5, 20, 6).contiguous(memory_format=layout)
    whole = narrow(lambda x: in_bands(layer, x), x)
    assert whole.is_contiguous(memory_format=layout)
    torch.testing.assert_close(whole, layer(x).detach())


def test_a_normalisation_in_bands_has_the_statistics_of_the_whole(narrow):
    norm, x = lively(nn.GroupNorm(4, 8)), 100 + steep(2, 8, 30, 6)
    of_all = NormOf(norm, x)
    bands = narrow(lambda: torch.cat([of_all(band) for band in x.split(7, dim=2)], dim=2))
    torch.testing.assert_close(bands, norm(x).detach(), atol=1e-4, rtol=1e-4)


SIZES = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
         "resolution": 32, "z_channels": 4}  # fmt: skip


@pytest.mark.parametrize(("network", "channels"), [(Encoder, 3), (Decoder, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_halves_of_an_autoencoder_have_no_seams(network, channels, dtype, narrow):
    torch.manual_seed(0)
    half, x = network(**SIZES).eval().to(dtype), steep(1, channels, 32, 32).to(dtype)
    with torch.no_grad():
        whole = half(x)
    # In bfloat16 the sums of a convolution may be rounded in another order.
    error = (narrow(half, x, entries=4096) - whole).float().abs().mean() / whole.float().std()
    assert error < (1e-5 if dtype is torch.float32 else 1e-2)


def test_training_is_not_cut_into_bands():
    block, x = lively(ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0)), torch.randn(1, 32, 16, 4)
    seen = []
    block.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2]))
    previous = set_band(1)
    try:
        block(x)
    finally:
        set_band(previous)
    assert seen == [16]


def test_a_band_without_room_is_refused():
    with pytest.raises(ValueError, match="1 entry"):
        set_band(0)
