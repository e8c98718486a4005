"""Token merging: exact where pixels are alike, and gone after its block."""

import pytest
import torch

from ldm.modules import merging as module
from ldm.modules.attention import SpatialTransformer
from ldm.modules.merging import join, merging, places, spread


@pytest.fixture
def small(monkeypatch):
    """Merge in attention over any number of tokens."""
    monkeypatch.setattr(module, "FEWEST", 1)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    made = SpatialTransformer(32, 2, 16, depth=2, context_dim=8).eval().requires_grad_(False)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return made


def test_the_most_alike_join_the_corner_that_they_resemble():
    x = torch.tensor([[1.0, 0], [0, 1], [0, 3], [1, 1], [0, 1], [1, 0.1], [5, 0], [1, -1]])[None]  # 2 rows of 4
    place, count = places(x, (2, 4), share=0.5)
    # The corners are tokens 0 and 2; the likest of the others are 1 and 4, as 2 is, and 6, as 0 is, then 5.
    assert count == 4
    assert place[0].tolist() == [0, 1, 1, 2, 1, 0, 0, 3]


def test_tokens_of_one_place_are_averaged_and_all_get_what_is_there():
    place = torch.tensor([[0, 1, 1, 0]])
    joined = join(torch.tensor([[[1.0], [2.0], [4.0], [5.0]]]), place, 2)
    assert joined.flatten().tolist() == [3, 3]
    assert spread(torch.tensor([[[7.0], [8.0]]]), place).flatten().tolist() == [7, 8, 8, 7]


@pytest.mark.parametrize("sides", [(8, 6), (5, 7)])
def test_every_place_is_taken_for_any_sides_and_share(sides):
    x = torch.randn(2, sides[0] * sides[1], 4)
    for share in (0.1, 0.5, 0.75):
        place, count = places(x, sides, share)
        for one in place:
            assert one.unique().tolist() == list(range(count))


def test_where_the_pixels_of_each_cell_are_one_merging_changes_nothing(small, layer):
    cells = torch.randn(2, 32, 4, 3).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    context = torch.randn(2, 5, 8)
    whole = layer(cells, context)
    with merging(layer, 0.75) as made:
        merged = layer(cells, context)
    assert [one.used for one in made] == [True]
    torch.testing.assert_close(merged, whole, atol=1e-4, rtol=1e-4)


def test_pixels_that_differ_come_out_near_and_as_before_after_the_block(small, layer):
    x, context = torch.randn(1, 32, 6, 6), torch.randn(1, 5, 8)
    whole = layer(x, context)
    with merging(layer, 0.5):
        merged = layer(x, context)
    assert 0 < (merged - whole).norm() / whole.norm() < 0.5
    assert torch.equal(layer(x, context), whole)


def test_attention_over_few_tokens_stays_whole(layer):
    x, context = torch.randn(1, 32, 6, 6), torch.randn(1, 5, 8)
    whole = layer(x, context)
    with merging(layer, 0.5) as made:
        assert torch.equal(layer(x, context), whole)
    assert not made[0].used


def test_half_precision_is_kept(small):
    place, count = places(torch.randn(1, 16, 4, dtype=torch.bfloat16), (4, 4), 0.5)
    assert join(torch.ones(1, 16, 4, dtype=torch.bfloat16), place, count).dtype == torch.bfloat16
