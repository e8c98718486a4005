import math

import pytest
import torch

from ldm.errors import RequestError
from ldm.sampling.prediction import CLEAN, Level, to_prediction


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_every_parameterization_recovers_the_clean_latent_and_the_noise(kind):
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    now = Level(t=500, alpha=0.6, sigma=0.8)
    out = {"eps": eps, "v": now.alpha * eps - now.sigma * x0, "x0": x0}[kind]
    pred = to_prediction(kind, now.alpha * x0 + now.sigma * eps, out, now)
    torch.testing.assert_close(pred.x0, x0)
    torch.testing.assert_close(pred.eps, eps)


def test_v_reads_the_clean_latent_even_out_of_pure_noise():
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    pred = to_prediction("v", eps, -x0, Level(999, 0.0, 1.0))
    torch.testing.assert_close(pred.x0, x0)
    torch.testing.assert_close(pred.eps, eps)


def test_eps_out_of_pure_noise_is_refused():
    with pytest.raises(RequestError, match="alpha is 0"):
        to_prediction("eps", torch.ones(1), torch.ones(1), Level(999, 0.0, 1.0))


def test_an_unknown_parameterization_is_named():
    with pytest.raises(ValueError, match="eps, x0 or v, got 'score'"):
        to_prediction("score", torch.ones(1), torch.ones(1), CLEAN)


def test_a_level_knows_its_log_snr_and_the_sigma_of_karras():
    level = Level(500, 0.6, 0.8)
    assert level.log_snr == pytest.approx(math.log(0.75))
    assert level.edm_sigma == pytest.approx(4 / 3)
    assert (CLEAN.log_snr, CLEAN.edm_sigma) == (math.inf, 0)
    assert (Level(999, 0.0, 1.0).log_snr, Level(999, 0.0, 1.0).edm_sigma) == (-math.inf, math.inf)
