"""The denoiser of Stability AI's configs."""

import pytest
import torch

from ldm.modules.diffusionmodules.denoiser import DiscreteDenoiser

HERE = "ldm.modules.diffusionmodules.denoiser"


def denoiser(scaling: str = "EpsScaling", num_idx: int = 1000) -> DiscreteDenoiser:
    return DiscreteDenoiser(
        {"target": f"{HERE}.{scaling}"}, num_idx, {"target": f"{HERE}.LegacyDDPMDiscretization"})


def test_the_levels_are_those_that_stable_diffusion_was_trained_on():
    sigmas = denoiser().sigmas  # known of the published models: 0.0292 to 14.6146
    assert sigmas.shape == (1000,) and (sigmas.diff() > 0).all()
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.0292, 14.6146]), atol=1e-4, rtol=0)


def test_the_scaling_tells_what_the_network_predicts():
    assert (denoiser().parameterization, denoiser("VScaling").parameterization) == ("eps", "v")


def test_a_number_of_levels_that_is_not_theirs_is_refused():
    with pytest.raises(ValueError, match="1000 levels of the discretization, got 500"):
        denoiser(num_idx=500)
