"""A large latent, asked for in overlapping tiles."""

import itertools

import pytest
import torch

from ldm.sampling import tiled
from ldm.sampling.tiles import starts


def pointwise(x, t, cond):
    """A network that looks at each place by itself, and at what is beside it by channel."""
    return x.sin() + cond["c_concat"][0] * t[:, None, None, None]


def asked(height: int, width: int) -> tuple:
    x, beside = torch.randn(2, 2, 4, height, width)
    return x, torch.tensor([1.0, 2.0]), {"c_concat": [beside], "c_crossattn": [torch.zeros(2, 1)]}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 20), (31, 9), (40, 40), (5, 30)])
def test_where_places_do_not_look_at_each_other_tiles_change_nothing(height, width):
    x, t, cond = asked(height, width)
    torch.testing.assert_close(tiled(pointwise, 8)(x, t, cond), pointwise(x, t, cond))


def test_a_latent_that_fits_is_asked_for_as_a_whole():
    x, t, cond = asked(8, 8)
    seen = []
    tiled(lambda *given: seen.append(given) or x, 8)(x, t, cond)
    assert seen[0][0] is x
    assert seen[0][2] is cond


def test_every_tile_has_the_size_that_was_asked_for_and_its_part_of_what_is_beside_it():
    x, t, cond = asked(20, 13)

    def network(part, t, cond):
        assert part.shape == cond["c_concat"][0].shape == (2, 4, 8, 8)
        return part

    torch.testing.assert_close(tiled(network, 8)(x, t, cond), x)


@pytest.mark.parametrize(("length", "side", "step"), [
    (9, 8, 1), (16, 8, 1), (100, 16, 4), (257, 256, 1), (1000, 64, 8), (96, 32, 4), (264, 256, 8),
])  # fmt: skip
def test_neighbours_share_a_quarter_begin_at_multiples_of_the_step_and_reach_both_ends(length, side, step):
    begins = starts(length, side, step)
    assert (begins[0], begins[-1] + side) == (0, length)
    assert not any(begin % step for begin in begins)
    assert all(now + side - then >= side // 4 for now, then in itertools.pairwise(begins))


def test_an_answer_changes_smoothly_from_tile_to_tile():
    # Each tile answers with a number of its own: between two of them it goes over a quarter of a side.
    numbers = iter(range(100))
    x, t, cond = asked(16, 40)
    out = tiled(lambda x, t, cond: torch.full_like(x, next(numbers)), 16)(x, t, cond)
    assert out.diff(dim=-1).abs().max() <= 1.01 / (16 // 4)
