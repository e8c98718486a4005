import fill
import pytest
import torch

from ldm.modules.diffusionmodules import model
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Downsample, Encoder, ResnetBlock, make_attn

TINY = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


def test_the_encoder_halves_the_sides_once_a_level_but_the_last():
    assert Encoder(**TINY)(torch.zeros(1, 3, 16, 24)).shape == (1, 8, 4, 6)
    assert Encoder(**TINY, double_z=False)(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4, 4)


def test_the_decoder_doubles_them_again():
    assert Decoder(**TINY)(torch.zeros(1, 4, 4, 6)).shape == (1, 3, 16, 24)
    assert Decoder(**TINY, give_pre_end=True)(torch.zeros(1, 4, 4, 4)).shape == (1, 32, 16, 16)


def test_tanh_keeps_the_pixels_in_range():
    decoder, z = fill.fill_module(Decoder(**TINY)), 9 * torch.randn(1, 4, 4, 4)
    decoder.conv_out.weight.data *= 30
    plain = decoder(z)
    decoder.tanh_out = True
    assert plain.abs().max() > 1
    torch.testing.assert_close(decoder(z), plain.tanh())


def test_attention_follows_the_blocks_of_the_named_side():
    keys = Encoder(**TINY).state_dict().keys()
    assert {key.split(".attn")[0] for key in keys if ".attn." in key} == {"down.1"}
    assert "mid.attn_1.q.weight" in keys


def test_a_picture_is_padded_at_the_right_and_the_bottom_before_it_is_halved():
    down = Downsample(1, with_conv=True)
    down.conv.weight.data.fill_(1.0)
    down.conv.bias.data.zero_()
    assert down(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]


def test_attention_is_softmax_over_all_pixels():
    block, x = fill.fill_module(AttnBlock(32)), torch.randn(2, 32, 3, 5)
    q, k, v = (layer(block.norm(x)).flatten(2) for layer in (block.q, block.k, block.v))  # (b, c, n)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(dim=-1)
    want = x + block.proj_out((v @ weights.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(block(x), want)


def test_a_residual_block_hears_the_time_embedding_and_fits_its_shortcut():
    for conv_shortcut in (False, True):
        block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=conv_shortcut, dropout=0.0, temb_channels=8)
        x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
        assert block(x, temb).shape == (1, 64, 4, 4)
        assert not torch.equal(block(x, temb), block(x, temb + 1))


def test_layers_look_the_nonlinearity_up_when_they_are_called(monkeypatch):
    encoder, x = Encoder(**TINY).eval(), torch.randn(1, 3, 16, 16)
    before = encoder(x)
    monkeypatch.setattr(model, "nonlinearity", torch.relu)
    assert not torch.allclose(encoder(x), before)


@pytest.mark.parametrize("kind", ["vanilla", "vanilla-xformers", "linear", "none"])
def test_attention_of_every_kind_keeps_the_shape(kind):
    assert make_attn(32, kind)(torch.randn(1, 32, 4, 6)).shape == (1, 32, 4, 6)


def test_attention_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="attn_type must be"):
        make_attn(32, "quadratic")


def test_norms_of_the_autoencoder_have_the_eps_of_the_original():
    assert {m.eps for m in Encoder(**TINY).modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
