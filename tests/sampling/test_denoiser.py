import pytest
import torch

from ldm.sampling import Level, denoiser

# alpha and sigma of noise levels, by sigma.
CIRCLE = {0.28: (0.96, 0.28), 0.6: (0.8, 0.6), 0.8: (0.6, 0.8), 0.96: (0.28, 0.96)}


def test_a_trained_step_reaches_the_network_as_an_int_and_one_between_as_a_float():
    seen = []

    def apply_model(x, t, cond):
        seen.append(t)
        return x

    denoise = denoiser(apply_model, "eps", None)
    for t in (500, 500.25):
        denoise(torch.ones(3, 1), Level(t, 0.6, 0.8))
    assert [t.dtype for t in seen] == [torch.int64, torch.float32]
    assert [t.tolist() for t in seen] == [[500] * 3, [500.25] * 3]


def test_guidance_comes_before_the_parameterization():
    level = Level(500, 0.6, 0.8)
    x = torch.ones(1, 1)
    pred = denoiser(lambda x, t, cond: cond, "v", torch.full((1, 1), 0.5), torch.zeros(1, 1), 4.0)(x, level)
    torch.testing.assert_close(pred.x0, 0.6 * x - 0.8 * torch.full((1, 1), 2.0))
    torch.testing.assert_close(level.alpha * pred.x0 + level.sigma * pred.eps, x)


@pytest.mark.parametrize("sigma, guided", [(0.8, True), (0.6, True), (0.28, False), (0.96, False)])
def test_only_noise_levels_of_the_interval_are_guided_and_the_others_ask_once(sigma, guided):
    asked = []

    def apply_model(x, t, cond):
        asked.append(len(x))
        return cond

    denoise = denoiser(apply_model, "eps", torch.full((1, 1), 3.0), torch.ones(1, 1), 7.5)
    denoise.interval = Level(0, *CIRCLE[0.28]).edm_sigma, Level(0, *CIRCLE[0.8]).edm_sigma
    assert denoise(torch.ones(1, 1), Level(500, *CIRCLE[sigma])).eps.item() == (1 + 7.5 * 2 if guided else 3)
    assert asked == [2 if guided else 1]
