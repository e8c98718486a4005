import pytest
import torch
from support import assert_matches, cases, golden
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl


@pytest.mark.parametrize("case", cases("posterior"), ids=lambda case: case["name"])
def test_the_posterior_is_that_of_the_original(case):
    wanted = {key.split("/")[1]: value for key, value in golden(case["file"]).items() if key.startswith("posterior/")}
    moments, other, x = (golden("inputs")[case["inputs"][name]] for name in ("moments", "moments2", "x"))
    torch.manual_seed(case["params"]["seed"])
    posterior = DiagonalGaussianDistribution(moments)
    assert_matches(posterior.sample(), wanted["sample"])
    assert_matches(posterior.mode(), wanted["mode"])
    assert_matches(posterior.var, wanted["var"])
    assert_matches(posterior.kl(), wanted["kl"])
    assert_matches(posterior.kl(DiagonalGaussianDistribution(other)), wanted["kl_other"])
    assert_matches(posterior.nll(x), wanted["nll"])


def test_log_variances_are_kept_within_bounds():
    posterior = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -99.0, 99.0]).reshape(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]


def test_a_deterministic_posterior_has_no_spread():
    posterior = DiagonalGaussianDistribution(torch.randn(1, 4, 2, 2), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mode())
    assert posterior.kl().item() == posterior.nll(posterior.mode()).item() == 0


def test_a_generator_makes_the_sample_its_own():
    posterior = DiagonalGaussianDistribution(torch.randn(1, 4, 2, 2))
    first, second = (posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_dirac_is_its_value():
    value = torch.randn(2)
    assert DiracDistribution(value).sample() is DiracDistribution(value).mode() is value


def test_the_divergence_of_two_gaussians_is_the_known_one():
    mean1, logvar1, mean2 = torch.randn(3, 5)
    want = kl_divergence(Normal(mean1, (0.5 * logvar1).exp()), Normal(mean2, 1.0))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, 0.0), want)
