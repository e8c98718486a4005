import fill
import pytest
import torch
from torch import nn

from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SpatialTransformer,
)


def test_cross_attention_splits_heads_and_attends_to_the_context():
    layer = fill.fill_module(CrossAttention(16, context_dim=24, heads=2, dim_head=8))
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 24)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        q, k, v = layer.to_q(x)[..., part], layer.to_k(context)[..., part], layer.to_v(context)[..., part]
        heads.append((q @ k.transpose(1, 2) / 8**0.5).softmax(dim=-1) @ v)
    torch.testing.assert_close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)))
    assert set(layer.state_dict()) == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_a_masked_position_of_the_context_does_not_count():
    layer, x, context = CrossAttention(16, heads=2, dim_head=8), torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    torch.testing.assert_close(layer(x, context, mask=mask), layer(x, context[:, :2]))


def test_a_block_calls_the_attention_that_is_patched_in(monkeypatch):
    block = BasicTransformerBlock(16, 2, 8, context_dim=16)
    monkeypatch.setattr(CrossAttention, "forward", lambda self, x, context=None, mask=None: torch.zeros_like(x))
    x = torch.randn(1, 4, 16)
    torch.testing.assert_close(block(x, context=x), x + block.ff(block.norm3(x)))


def test_a_block_without_self_attention_attends_to_the_context_twice():
    block = BasicTransformerBlock(16, 2, 8, context_dim=24, disable_self_attn=True)
    assert block.attn1.to_k.in_features == 24
    assert block(torch.randn(1, 4, 16), context=torch.randn(1, 3, 24)).shape == (1, 4, 16)


def test_a_block_attends_to_itself_twice_without_a_context():
    block, x = BasicTransformerBlock(16, 2, 8), torch.randn(1, 4, 16)
    y = block.attn1(block.norm1(x)) + x
    y = block.attn2(block.norm2(y)) + y
    torch.testing.assert_close(block(x), block.ff(block.norm3(y)) + y)


def test_projecting_by_a_matrix_or_by_a_convolution_is_the_same_arithmetic():
    conv, linear = (SpatialTransformer(32, 2, 16, context_dim=24, use_linear=use) for use in (False, True))
    fill.fill_module(conv)
    weights = conv.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        weights[name] = weights[name][:, :, 0, 0]
    linear.load_state_dict(weights)
    x, context = torch.randn(2, 32, 3, 5), torch.randn(2, 7, 24)
    assert (conv(x, context) - x).abs().max() > 0.1
    torch.testing.assert_close(linear(x, context), conv(x, context))


@pytest.mark.parametrize("use_linear", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_answer_keeps_the_layout_of_the_picture(use_linear, layout):
    x = torch.randn(2, 32, 3, 5).to(memory_format=layout)
    out = SpatialTransformer(32, 2, 16, context_dim=24, use_linear=use_linear)(x, torch.randn(2, 7, 24))
    assert out.is_contiguous(memory_format=layout)


def test_each_block_may_have_a_context_of_its_own():
    layer = fill.fill_module(SpatialTransformer(32, 2, 16, depth=2, context_dim=[24, 8]))
    x, contexts = torch.randn(1, 32, 2, 2), [torch.randn(1, 3, 24), torch.randn(1, 5, 8)]
    before = layer(x, contexts)
    assert (layer(x, [contexts[0], contexts[1] + 1]) - before).abs().max() > 1e-4


def test_a_feed_forward_layer_is_gated_if_asked():
    layer, x = FeedForward(8, glu=True, mult=2), torch.randn(3, 8)
    value, gate = layer.net[0].proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), layer.net[2](value * nn.functional.gelu(gate)))
    assert FeedForward(8, dim_out=5)(x).shape == (3, 5)


def test_linear_attention_mixes_values_by_the_softmax_of_the_keys():
    layer, x = LinearAttention(6, heads=1, dim_head=4), torch.randn(1, 6, 2, 3)
    q, k, v = layer.to_qkv(x).flatten(2).chunk(3, dim=1)  # (1, 4, n)
    want = layer.to_out(((v @ k.softmax(dim=-1).transpose(1, 2)) @ q).view(1, 4, 2, 3))
    torch.testing.assert_close(layer(x), want)


def test_norms_before_a_transformer_have_the_eps_of_the_original():
    assert SpatialTransformer(32, 2, 16, context_dim=8).norm.eps == 1e-6
