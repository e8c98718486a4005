"""The depth network gives the numbers of transformers' DPT on the same weights."""

import fill
import pytest
import torch
from depth import SIZES, their_dpt
from support import assert_matches

from ldm.errors import ConfigError
from ldm.modules.midas.api import MiDaSInference, fit_depth


@pytest.fixture(scope="module")
def ours():
    return fill.fill_module(MiDaSInference("dpt_hybrid", **SIZES)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(ours):
    return their_dpt({key.removeprefix("model."): weight for key, weight in ours.state_dict().items()})


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@torch.no_grad()
def test_the_depth_of_a_square_picture_is_that_of_transformers(ours, theirs):
    x = picture(64, 64)
    assert_matches(ours(x)[:, 0], theirs(x).predicted_depth, 1e-5)


@torch.no_grad()
def test_the_depth_of_an_oblong_picture_is_that_of_their_parts(ours, theirs):
    # Their model as a whole takes squares of one size alone.
    x = picture(96, 64)
    embedded = theirs.dpt.embeddings(x, interpolate_pos_encoding=True)
    hidden, levels = embedded.last_hidden_states, [*embedded.intermediate_activations]
    for number, layer in enumerate(theirs.dpt.encoder.layer):
        hidden = layer(hidden)
        levels += [hidden] if number in SIZES["hooks"] else []
    assert_matches(ours(x)[:, 0], theirs.head(theirs.neck(levels, 6, 4)), 1e-5)


@pytest.mark.parametrize("size, wanted", [
    ((480, 640), (384, 512)), ((512, 512), (384, 384)), ((100, 1000), (32, 384)), ((32, 48), (256, 384)),
])  # fmt: skip
def test_a_picture_is_resized_as_little_as_brings_one_side_to_384_in_steps_of_32(size, wanted):
    ours = MiDaSInference("dpt_hybrid", **SIZES)
    ours.model.side = 384
    assert ours.prepare(torch.zeros(1, 3, *size)).shape[-2:] == wanted


def test_depth_is_stretched_from_minus_one_to_one_in_each_picture_by_itself():
    depth = torch.stack([torch.arange(64.0).view(1, 8, 8), torch.arange(64.0).view(1, 8, 8) * 9 + 5])
    fitted = fit_depth(depth, (8, 8))
    assert fitted.amin(dim=(1, 2, 3)).tolist() == [-1, -1]
    assert fitted.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    torch.testing.assert_close(fitted[0], fitted[1])


def test_a_flat_depth_is_a_number():
    assert torch.equal(fit_depth(torch.full((1, 1, 4, 4), 7.0), (2, 2)), torch.full((1, 1, 2, 2), -1.0))


def test_another_depth_network_is_refused_by_name():
    with pytest.raises(ConfigError, match="midas_v21"):
        MiDaSInference("midas_v21")
