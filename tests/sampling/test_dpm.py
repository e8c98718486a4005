import numpy as np
import pytest
import torch
from sampling.analytic import SCHEDULE, denoise, geometric, last

from ldm.errors import RequestError
from ldm.sampling import Level, Prediction
from ldm.sampling.dpm import glide, sample_dpm_solver


def polynomial(degree: int):
    """A network whose x0 is lambda**degree, and the exact move along it by fine quadrature."""

    def network(x, level):
        x0 = torch.full_like(x, level.log_snr**degree)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    def exact(x: torch.Tensor, now: Level, then: Level) -> torch.Tensor:
        # x(then) = sigma' / sigma x + sigma' * integral of e**lambda x0(lambda)
        nodes, weights = np.polynomial.legendre.leggauss(20)
        half = (then.log_snr - now.log_snr) / 2
        lambdas = now.log_snr + half * (nodes + 1)
        integral = half * float(np.sum(weights * np.exp(lambdas) * lambdas**degree))
        return then.sigma / now.sigma * x + then.sigma * integral

    return network, exact


def test_a_glide_is_exact_for_a_constant_x0():
    network, exact = polynomial(0)
    x, (now, then) = torch.randn(4, dtype=torch.float64), geometric(1)
    torch.testing.assert_close(glide(x, network(x, now).x0, now, then), exact(x, now, then))


def test_third_order_multistep_is_exact_for_a_linear_x0_once_it_knows_three_values():
    network, exact = polynomial(1)
    levels = [SCHEDULE.at(sigma) for sigma in (8, 5, 3.5, 1.5, 1, 0.3, *(0.25 - 0.01 * i for i in range(14)))]
    x = torch.randn(4, dtype=torch.float64)
    latents = [latent.clone() for latent in sample_dpm_solver(network, x, levels, order=3)]
    for i in range(2, len(latents) - 1):
        torch.testing.assert_close(latents[i + 1], exact(latents[i], levels[i + 1], levels[i + 2]))


def test_third_order_singlestep_is_exact_for_a_linear_x0_over_a_block():
    network, exact = polynomial(1)
    levels = geometric(5)
    x = torch.randn(4, dtype=torch.float64)
    latents = [latent.clone() for latent in sample_dpm_solver(network, x, levels, order=3, method="singlestep")]
    torch.testing.assert_close(latents[2], exact(x, levels[0], levels[3]))


@pytest.mark.parametrize("steps, order, evaluations", [(20, 2, 20), (9, 3, 9), (10, 3, 10), (11, 3, 11)])
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_a_walk_costs_one_evaluation_a_move(method, steps, order, evaluations):
    asked = []

    def network(x, level):
        asked.append(level)
        return denoise(x, level)

    levels = geometric(steps)
    last(sample_dpm_solver(network, torch.ones(2), levels, order=order, method=method))
    assert asked == levels[:evaluations]


def test_short_multistep_walks_end_with_a_first_order_move_and_long_ones_do_not():
    for steps in (14, 15):
        levels = geometric(steps)
        *_, before, end = (x.clone() for x in sample_dpm_solver(denoise, torch.linspace(-1, 1, 5), levels))
        first_order = glide(before, denoise(before, levels[-2]).x0, levels[-2], levels[-1])
        assert torch.allclose(end, first_order) == (steps < 15)


def test_exchanging_alpha_and_sigma_solves_for_the_noise():
    """Plain DPM-Solver of first order is DDIM too; at second order it must converge to the same end."""

    def exchanged(x, level):
        pred = denoise(x, Level(level.t, level.sigma, level.alpha))
        return Prediction(pred.eps, pred.x0)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    levels = geometric(200)
    swapped = [Level(t, sigma, alpha) for t, alpha, sigma in levels]
    for method in ("multistep", "singlestep"):
        got = last(sample_dpm_solver(exchanged, x, swapped, method=method))
        torch.testing.assert_close(got, last(sample_dpm_solver(denoise, x, levels, order=3)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{"order": 4}, {"order": 0}, {"method": "adaptive"}])
def test_an_order_or_method_that_does_not_exist_is_refused(options):
    with pytest.raises(RequestError, match="orders 1 to 3"):
        sample_dpm_solver(denoise, torch.ones(1), geometric(3), **options)
