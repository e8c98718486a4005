import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sampling.analytic import SCHEDULE
from support import assert_matches, cases, golden

from ldm.errors import RequestError
from ldm.sampling import CLEAN
from ldm.sampling.schedule import (
    Schedule,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)

KEPT = golden("schedule")["schedule/alphas_cumprod"]


@pytest.mark.parametrize("name", cases("betas")[0]["params"]["schedules"])
def test_beta_schedules_are_the_originals(name):
    params = cases("betas")[0]["params"]
    betas = make_beta_schedule(name, params["n"], linear_start=params["start"], linear_end=params["end"])
    assert betas.dtype == np.float64
    assert_matches(betas, golden("schedule")[f"beta_schedules/betas_{name}"], 1e-12)


def test_cosine_betas_follow_the_squared_cosine_up_to_their_cap():
    betas = make_beta_schedule("cosine", 100)
    kept = np.cumprod(1 - betas)[:-1]
    want = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(100)]
    np.testing.assert_allclose(kept, np.array(want[1:]) / want[0])
    assert betas[-1] == 0.999


def test_an_unknown_beta_schedule_is_named():
    with pytest.raises(ValueError, match="got 'quadratic'"):
        make_beta_schedule("quadratic", 10)


@pytest.mark.parametrize("method", ["uniform", "quad"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_timesteps_and_parameters_are_the_originals(method, steps):
    want = {key: value for key, value in golden("schedule").items() if f"/{method}_S{steps}_" in key}
    timesteps = make_ddim_timesteps(method, steps, 1000, verbose=False)
    assert timesteps.tolist() == want[f"schedule/{method}_S{steps}_ddim_timesteps"].tolist()
    for eta in (0.0, 1.0):
        sigmas, alphas, before = make_ddim_sampling_parameters(KEPT, timesteps, eta, verbose=False)
        assert_matches(sigmas, want[f"schedule/{method}_S{steps}_eta{eta:.0f}_ddim_sigmas"])
        assert_matches(alphas, want[f"schedule/{method}_S{steps}_ddim_alphas"], 0)
        assert_matches(before, want[f"schedule/{method}_S{steps}_ddim_alphas_prev"], 0)


def test_uniform_timesteps_keep_the_original_wherever_it_stayed_within_the_schedule():
    for steps in range(1, 1001):
        original = np.arange(0, 1000, 1000 // steps) + 1
        ours = make_ddim_timesteps("uniform", steps, 1000, verbose=False)
        if original[-1] <= 999:
            assert ours.tolist() == original.tolist()
        else:
            gaps = np.diff(ours)
            assert len(ours) == steps and 0 <= ours[0] <= 1 and ours[-1] <= 999
            assert (1000 // steps <= gaps).all() and (gaps <= -(-1000 // steps)).all()


def test_thirty_uniform_steps_are_still_thirty_one():
    assert len(make_ddim_timesteps("uniform", 30, 1000)) == 31
    assert len(SCHEDULE.uniform(30)) == 32


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize(
    "spacing", ["uniform", "ancestral", "time_uniform", "sigma_uniform", "karras", "exponential", "trailing"]
)
def test_a_step_count_that_the_schedule_does_not_have_is_refused(spacing, steps):
    with pytest.raises(RequestError, match=f"1 to 1000, got {steps}"):
        getattr(SCHEDULE, spacing)(steps)


def test_an_unknown_ddim_spacing_is_named():
    with pytest.raises(ValueError, match="got 'cubic'"):
        make_ddim_timesteps("cubic", 10, 1000)


@pytest.mark.parametrize("spacing, name", [("sigma_uniform", "model"), ("karras", "karras")])
def test_sigmas_are_those_of_k_diffusion(spacing, name):
    levels = getattr(Schedule(KEPT), spacing)(12)
    assert_matches([level.edm_sigma for level in levels], golden("k_diffusion")[f"kdiff_eps/sigmas_{name}"], 1e-6)


def test_the_timestep_of_a_sigma_is_that_of_k_diffusion():
    sigmas = golden("k_diffusion")["kdiff_eps/sigmas_karras"][:-1]
    timesteps = [Schedule(KEPT).at(float(sigma)).t for sigma in sigmas]
    assert_matches(timesteps, golden("k_diffusion")["kdiff_eps/sigma_to_t"], 1e-6)


@pytest.mark.parametrize("t", [0, 0.5, 333.25, 999])
def test_the_level_of_a_timestep_leads_back_to_it(t):
    level = SCHEDULE.level(t)
    back = SCHEDULE.at(level.edm_sigma)
    assert back == pytest.approx(level)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


def test_a_trained_step_is_an_int_and_takes_its_alpha_from_the_table():
    level = SCHEDULE.level(500.0)
    assert isinstance(level.t, int)
    assert level.alpha == SCHEDULE.alphas_cumprod[500] ** 0.5


def test_a_sigma_outside_of_the_trained_range_keeps_its_size_and_asks_for_the_nearest_step():
    assert SCHEDULE.at(1000.0)[:1] == (999,)
    assert SCHEDULE.at(1000.0).edm_sigma == pytest.approx(1000)
    assert SCHEDULE.at(0) == CLEAN


def test_dpm_levels_are_linear_in_log_alpha():
    low, middle, high = (math.log(SCHEDULE.dpm_level(t).alpha) for t in (700, 700.5, 701))
    assert middle == pytest.approx((low + high) / 2)
    assert [level.t for level in SCHEDULE.time_uniform(4)] == [999, 749.25, 499.5, 249.75, 0]


def test_trailing_steps_count_down_from_the_last_trained_one():
    assert [level.t for level in SCHEDULE.trailing(4)] == [999, 749, 499, 249, 0]
    assert SCHEDULE.trailing(4)[-1] == CLEAN
    assert [level.t for level in SCHEDULE.trailing(1000)[:-1]] == list(range(999, -1, -1))


def test_exponential_steps_shrink_sigma_by_one_ratio():
    sigmas = [level.edm_sigma for level in SCHEDULE.exponential(5)]
    assert sigmas[0] == pytest.approx(SCHEDULE.level(999).edm_sigma)
    assert sigmas[4] == pytest.approx(SCHEDULE.level(0).edm_sigma)
    ratios = [b / a for a, b in pairwise(sigmas[:5])]
    assert ratios == pytest.approx([ratios[0]] * 4)


def test_a_thousand_ancestral_steps_are_the_whole_chain():
    assert [level.t for level in SCHEDULE.ancestral(1000)[:-1]] == list(range(999, -1, -1))


def test_uniform_levels_end_at_the_first_trained_step():
    levels = SCHEDULE.uniform(50)
    assert [level.t for level in levels[:2]] == [981, 961]
    assert levels[-1] == SCHEDULE.level(0)


def test_a_schedule_reads_half_precision_tensors_and_lists_alike():
    kept = torch.tensor([0.75, 0.5, 0.25])
    assert Schedule(kept.to(torch.bfloat16)).level(1) == Schedule(kept.tolist()).level(1)


def test_a_schedule_may_end_in_pure_noise():
    schedule = Schedule([0.99, 0.5, 0.0])
    assert schedule.level(2) == (2, 0.0, 1.0)
    assert schedule.trailing(3)[0].alpha == 0
    with pytest.raises(RequestError, match="zero terminal SNR"):
        schedule.karras(2)
