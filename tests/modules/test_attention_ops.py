import pytest
import torch

from ldm.modules import attention_ops
from ldm.modules.attention_ops import attention, set_attention


@pytest.fixture
def chosen(request):
    previous = set_attention(request.param)
    yield request.param
    set_attention(previous)


every_method = pytest.mark.parametrize("chosen", ["sdpa", "cached", "sliced", "math"], indirect=True)


def plain(q, k, v, scale, mask=None):
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    if mask is not None:
        scores = scores.where(mask, -torch.inf)
    return (scores.softmax(dim=-1) @ v.double()).float()


@every_method
def test_every_method_computes_the_formula(chosen):
    q, (k, v) = torch.randn(2, 3, 7, 8), torch.randn(2, 2, 3, 5, 8)
    torch.testing.assert_close(attention(q, k, v, 0.3), plain(q, k, v, 0.3))


@every_method
@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (7, 5)])
def test_every_method_looks_only_where_the_mask_lets_it(chosen, shape, monkeypatch):
    monkeypatch.setattr(attention_ops, "SLICE_ENTRIES", 60)
    q, (k, v) = torch.randn(2, 3, 7, 8), torch.randn(2, 2, 3, 5, 8)
    mask = torch.rand(shape) > 0.5
    mask[..., 2] = True
    torch.testing.assert_close(attention(q, k, v, 0.3, mask), plain(q, k, v, 0.3, mask))


@pytest.mark.parametrize("entries", [1, 60, 2**26])
@pytest.mark.parametrize("chosen", ["sliced"], indirect=True)
def test_slices_of_any_size_give_the_same(chosen, entries, monkeypatch):
    monkeypatch.setattr(attention_ops, "SLICE_ENTRIES", entries)
    q, (k, v) = torch.randn(2, 3, 7, 8), torch.randn(2, 2, 3, 5, 8)
    torch.testing.assert_close(attention(q, k, v, 0.3), plain(q, k, v, 0.3))


@pytest.mark.parametrize("entries", [1, 30, 60, 2**20])
@pytest.mark.parametrize("chosen", ["cached"], indirect=True)
def test_few_rows_at_a_time_give_the_same_in_bfloat16(chosen, entries, monkeypatch):
    monkeypatch.setattr(attention_ops, "CACHED_ENTRIES", entries)
    q, (k, v) = torch.randn(2, 3, 7, 8).bfloat16(), torch.randn(2, 2, 3, 5, 8).bfloat16()
    with torch.no_grad():
        got = attention(q, k, v, 0.3)
    assert not got.is_contiguous()
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.float(), plain(q, k, v, 0.3), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("chosen", ["cached"], indirect=True)
def test_gradients_go_through_the_fused_kernel(chosen):
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.bfloat16).requires_grad_()
    attention(q, k, v, 0.3).float().sum().backward()


@pytest.mark.parametrize("chosen", ["math", "sliced"], indirect=True)
def test_large_scores_do_not_overflow_half_precision(chosen):
    q = torch.full((1, 1, 2, 64), 50.0, dtype=torch.float16)
    v = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float16)
    assert attention(q, q, v, 64**-0.5).flatten().tolist() == [2, 2]


def test_choosing_gives_back_the_previous_choice_and_refuses_unknown_ones():
    usual = set_attention("math")
    assert set_attention(usual) == "math"
    with pytest.raises(ValueError, match="sdpa, cached, sliced, math"):
        set_attention("flash")


def test_gradients_of_short_sequences_are_those_of_the_fused_kernel(monkeypatch):
    def gradient(short: int) -> torch.Tensor:
        monkeypatch.setattr(attention_ops, "SHORT", short)
        q, k, v = (torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(i), requires_grad=True)
                   for i in range(3))
        attention(q, k, v, 0.3).square().sum().backward()
        return torch.stack([q.grad, k.grad, v.grad])

    torch.testing.assert_close(gradient(36), gradient(35))
