import numpy as np
import pytest
import torch
from sampling.analytic import SCHEDULE, denoise, geometric, last

from ldm.sampling import CLEAN, SAMPLERS
from ldm.sampling.karras import ancestral, multistep_weights, sample_dpmpp_sde, sample_euler, sample_euler_a
from ldm.sampling.vp import sample_ddim


def test_down_and_up_make_the_next_sigma():
    down, up = ancestral(3.0, 2.0)
    assert down**2 + up**2 == pytest.approx(4)
    assert down == pytest.approx(4 / 3)
    assert ancestral(3.0, 0.0) == (0, 0)


def test_euler_is_ddim_and_euler_a_is_ddim_at_eta_1():
    x, levels = torch.linspace(-2, 2, 9, dtype=torch.float64), geometric(10)
    torch.testing.assert_close(last(sample_euler(denoise, x, levels)), last(sample_ddim(denoise, x, levels)))
    noise = torch.randn(10, 9, dtype=torch.float64)
    walks = []
    for sample, options in ((sample_euler_a, {}), (sample_ddim, {"eta": 1.0})):
        given = iter(noise)
        walks.append(last(sample(denoise, x, levels, draw=lambda x, given=given: next(given), **options)))
    torch.testing.assert_close(*walks)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_linear_multistep_weights_integrate_polynomials_exactly(count):
    sigmas, end = [2.0, 2.7, 4.1, 6.0][:count], 1.2
    weights = multistep_weights(sigmas, end)
    for degree in range(count):
        want = (end ** (degree + 1) - sigmas[0] ** (degree + 1)) / (degree + 1)
        assert np.dot(weights, np.power(sigmas, degree)) == pytest.approx(want)


@pytest.mark.parametrize("name, count", [("euler_a", 4), ("dpm2_a", 4), ("dpmpp_2s_a", 4), ("dpmpp_2m_sde", 4),
                                         ("dpmpp_sde", 8)])  # fmt: skip
def test_no_noise_is_drawn_for_the_clean_latent(name, count):
    calls = []

    def draw(x):
        calls.append(x)
        return torch.zeros_like(x)

    last(SAMPLERS[name](denoise, torch.ones(3), [*geometric(4), CLEAN], SCHEDULE, draw=draw))
    assert len(calls) == count


@pytest.mark.parametrize("name, count", [("euler", 5), ("lms", 5), ("dpmpp_2m", 5), ("heun", 9), ("dpm2", 9),
                                         ("dpmpp_2s_a", 9), ("dpmpp_sde", 9)])  # fmt: skip
def test_a_move_costs_one_or_two_evaluations_and_the_last_one_only_one(name, count):
    asked = []

    def network(x, level):
        asked.append(level)
        return denoise(x, level)

    last(SAMPLERS[name](network, torch.ones(3), [*geometric(4), CLEAN], SCHEDULE))
    assert len(asked) == count
    assert all(level.sigma > 0 for level in asked)


def test_the_whole_noise_of_dpmpp_sde_contains_the_noise_of_its_first_half():
    """The half step sees the first draw alone; the whole weighs both by the share of sigma that each covers."""
    now, then = SCHEDULE.at(4.0), SCHEDULE.at(1.0)
    asked = []

    def network(x, level):
        asked.append(x)
        return denoise(torch.zeros_like(x), level)._replace(x0=torch.zeros_like(x))

    given = iter([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
    (x,) = sample_dpmpp_sde(network, torch.zeros(2), [now, then], at=SCHEDULE.at, draw=lambda x: next(given))
    middle = SCHEDULE.at(2.0)
    torch.testing.assert_close(asked[1], middle.alpha * ancestral(4.0, 2.0)[1] * torch.tensor([1.0, 0.0]))
    share = torch.tensor([2 / 3, 1 / 3]).sqrt()
    torch.testing.assert_close(x, then.alpha * ancestral(4.0, 1.0)[1] * share)
