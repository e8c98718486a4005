import pytest
import torch
from sampling.analytic import SCHEDULE, denoise, geometric, last

from ldm.sampling import CLEAN, Prediction
from ldm.sampling.vp import ADAMS_BASHFORTH, move, sample_ddim, sample_ddpm, sample_plms


def counting():
    calls = []

    def draw(x):
        calls.append(x.shape)
        return torch.zeros_like(x)

    return draw, calls


def test_ddim_draws_at_every_step_even_without_eta():
    draw, calls = counting()
    last(sample_ddim(denoise, torch.ones(2, 3), geometric(7), draw=draw))
    assert calls == [(2, 3)] * 7


def test_plms_draws_once_more_for_its_first_step():
    draw, calls = counting()
    last(sample_plms(denoise, torch.ones(2, 3), geometric(7), draw=draw))
    assert len(calls) == 8


def test_a_move_keeps_the_prediction_and_trades_its_noise_for_new():
    now, then = SCHEDULE.level(600), SCHEDULE.level(400)
    x0, eps, fresh = torch.randn(3, 5, dtype=torch.float64)
    plain = move(Prediction(x0, eps), now, then, 0.0, lambda x: fresh)
    torch.testing.assert_close(plain, then.alpha * x0 + then.sigma * eps)
    kick = (then.sigma / now.sigma) * (1 - (now.alpha / then.alpha) ** 2) ** 0.5
    got = move(Prediction(x0, eps), now, then, 0.5, lambda x: fresh)
    want = then.alpha * x0 + (then.sigma**2 - (0.5 * kick) ** 2) ** 0.5 * eps + 0.5 * kick * fresh
    torch.testing.assert_close(got, want)


def test_ddpm_draws_from_the_posterior():
    """The mean and the variance of q(x_s | x_t, x_0) in the form of Ho et al. 2020, eq. 7."""
    now, then = SCHEDULE.level(500), SCHEDULE.level(499)
    x, fresh = torch.randn(2, 5, dtype=torch.float64)
    beta = 1 - (now.alpha / then.alpha) ** 2
    x0 = denoise(x, now).x0
    mean = then.alpha * beta / now.sigma**2 * x0 + (1 - beta) ** 0.5 * then.sigma**2 / now.sigma**2 * x
    want = mean + (beta * then.sigma**2 / now.sigma**2) ** 0.5 * fresh
    (got,) = sample_ddpm(denoise, x, [now, then], draw=lambda x: fresh)
    torch.testing.assert_close(got, want)


def test_ddpm_ends_at_the_clean_latent_whatever_is_drawn():
    now = SCHEDULE.level(0)
    x = torch.randn(5, dtype=torch.float64)
    (got,) = sample_ddpm(denoise, x, [now, CLEAN])
    torch.testing.assert_close(got, denoise(x, now).x0)


def test_plms_holds_a_noise_that_does_not_change():
    eps = torch.randn(4, dtype=torch.float64)
    start, *_, end = levels = geometric(6)

    def constant(x, level):
        return Prediction((x - level.sigma * eps) / level.alpha, eps)

    got = last(sample_plms(constant, start.alpha * 0.3 + start.sigma * eps, levels))
    torch.testing.assert_close(got, end.alpha * 0.3 + end.sigma * eps)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_the_multistep_weights_are_exact_for_polynomials(known):
    """Over the step from 0 to 1, with values at 0, -1, -2 ...: the mean of s**n is 1 / (n + 1)."""
    for n in range(known + 1):
        got = sum(weight * (-k) ** n for k, weight in enumerate(ADAMS_BASHFORTH[known]))
        assert got == pytest.approx(1 / (n + 1))
