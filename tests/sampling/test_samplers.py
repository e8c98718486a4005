"""What holds for every sampler, by the registry."""

import pytest
import torch
from sampling.analytic import SCHEDULE, denoise, geometric, last, solve

from ldm.errors import RequestError
from ldm.sampling import CLEAN, SAMPLERS, SPACINGS, Level, Prediction, Schedule, cut, levels, tail

NAMES = ["ddpm", "ddim", "plms", "dpm_solver", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "euler", "euler_a", "heun",
         "lms", "dpm2", "dpm2_a", "dpmpp_2s_a", "unipc"]
RANDOM = ["ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_2m_sde", "dpmpp_sde"]
# Each way to walk with no noise, and the order of its error: halving the steps must shrink it by 2**order.
ORDERS = [
    ("ddim", {}, 1), ("plms", {}, 2), ("euler", {}, 1), ("heun", {}, 2), ("dpm2", {}, 2), ("lms", {}, 2.5),
    ("dpmpp_2m", {}, 2), ("unipc", {}, 2), ("unipc", {"order": 3}, 2),
    ("dpm_solver", {"order": 1}, 1), ("dpm_solver", {}, 2), ("dpm_solver", {"order": 3}, 2),
    ("dpm_solver", {"method": "singlestep"}, 2), ("dpm_solver", {"order": 3, "method": "singlestep"}, 3),
]  # fmt: skip


def test_the_registry_has_every_sampler():
    assert list(SAMPLERS) == NAMES


@pytest.mark.parametrize("name, options, order", ORDERS)
def test_the_error_shrinks_with_the_order_of_the_sampler(name, options, order):
    x = torch.linspace(-2.2, 2.2, 21, dtype=torch.float64)

    def error(steps: int) -> float:
        walk = geometric(steps)
        got = last(SAMPLERS[name](denoise, x, walk, SCHEDULE, **options))
        return float((got - solve(x, walk[0], walk[-1])).abs().max())

    coarse, fine = error(74), error(146)
    assert fine < 0.02
    assert coarse / fine > 2 ** (order - 0.2)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean_and_spread_of_the_data(name):
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(20000, generator=generator, dtype=torch.float64)
    walk = levels(SCHEDULE, name, 60)
    x = last(SAMPLERS[name](
        denoise, SAMPLERS[name].start(noise, walk[0]), walk, SCHEDULE,
        draw=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    ))  # fmt: skip
    assert abs(float((x > 0).double().mean()) - 0.5) < 0.03
    assert float(x.abs().mean()) == pytest.approx(0.8, abs=0.04)
    assert float(x.std()) == pytest.approx((0.8**2 + 0.4**2) ** 0.5, abs=0.05)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_spacing_works_with_every_sampler_and_yields_once_a_move(name, spacing):
    walk = levels(SCHEDULE, name, 10, spacing)
    assert len(walk) == 11
    assert [level.sigma for level in walk] == sorted((level.sigma for level in walk), reverse=True)
    for part in (walk, walk[-4:], walk[-2:], walk[-1:]):
        x = torch.linspace(-1, 1, 5)
        latents = list(SAMPLERS[name](denoise, x, part, SCHEDULE))
        assert len(latents) == len(part) - 1
        assert all(latent.isfinite().all() and latent.shape == x.shape for latent in latents)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_caller_writes_into_a_yielded_latent_is_gone_on_from(name):
    """Beside a fresh walk from there, by a network whose answers, and so what a sampler remembers, never change."""

    def certain(x, level):
        if name in ("plms", "lms"):  # these remember the noise, the others the clean latent
            return Prediction((x - level.sigma * 0.7) / level.alpha, torch.full_like(x, 0.7))
        return Prediction(torch.full_like(x, 0.7), (x - level.alpha * 0.7) / level.sigma)

    def walk(x, part):
        return SAMPLERS[name](certain, x, part, SCHEDULE, draw=torch.zeros_like)

    part = geometric(20)
    written = torch.tensor([-0.5, 0.1, 2.0], dtype=torch.float64)
    for count, x in enumerate(walk(torch.ones_like(written), part), start=1):
        if count == 7:
            x.copy_(written)
    torch.testing.assert_close(x, last(walk(written, part[7:])))


@pytest.mark.parametrize("name", [*RANDOM, "ddim"])
def test_the_noise_that_is_drawn_keeps_every_level_at_its_variance(name):
    """With a certain denoiser a latent is linear in its draws: one-hot draws read off the weight of each."""
    draws = 40

    def certain(x, level):
        return Prediction(torch.zeros_like(x), x / level.sigma)

    counter = iter(range(1, draws))

    def draw(x):
        return torch.nn.functional.one_hot(torch.tensor(next(counter)), draws).double()

    part = geometric(16)
    start = part[0].sigma * torch.nn.functional.one_hot(torch.tensor(0), draws).double()
    eta = {"eta": 0.7} if name == "ddim" else {}
    for level, x in zip(part[1:], SAMPLERS[name](certain, start, part, SCHEDULE, draw=draw, **eta)):
        assert float(x.norm()) == pytest.approx(level.sigma)


@pytest.mark.parametrize("name", NAMES)
def test_eta_is_for_ddim_alone(name):
    part = geometric(3)
    if name == "ddim":
        plain, random = (last(SAMPLERS[name](denoise, torch.ones(3), part, SCHEDULE, eta=eta)) for eta in (0, 1))
        assert not torch.allclose(plain, random)
    else:
        with pytest.raises(RequestError, match="eta is for ddim alone"):
            SAMPLERS[name](denoise, torch.ones(3), part, SCHEDULE, eta=0.5)


def test_the_karras_family_starts_from_scaled_noise_and_compvis_from_the_noise_itself():
    level, noise = SCHEDULE.level(500), torch.ones(2)
    assert SAMPLERS["euler"].start(noise, level).tolist() == pytest.approx([level.sigma] * 2)
    for name in ("plms", "dpm_solver"):
        assert SAMPLERS[name].start(noise, level).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "plms", "dpm_solver", "unipc", "euler", "euler_a", "dpmpp_2m"])
def test_a_walk_may_begin_in_pure_noise(name):
    """At alpha 0 the latent says nothing, so the first move must lead to the mean of the data, 0, and noise."""
    kept = SCHEDULE.alphas_cumprod.copy()
    kept[-1] = 0
    schedule = Schedule(kept)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for spacing in ("trailing", "default"):
        walk = [Level(999, 0.0, 1.0), *levels(schedule, name, 40, spacing)[1:]]
        got = last(SAMPLERS[name](denoise, x, walk, schedule, draw=torch.zeros_like))
        assert got.isfinite().all()
        if name not in RANDOM:
            torch.testing.assert_close(got, solve(x, walk[0], walk[-1]), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["heun", "lms", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2m_sde", "dpmpp_sde"])
def test_a_sampler_that_needs_a_finite_sigma_says_so(name):
    walk = [Level(999, 0.0, 1.0), *SCHEDULE.trailing(5)[1:]]
    with pytest.raises(RequestError, match="finite sigma"):
        last(SAMPLERS[name](denoise, torch.ones(2), walk, SCHEDULE))


def test_an_unknown_sampler_or_spacing_is_named():
    with pytest.raises(RequestError, match=r"one of ddpm, .* got 'magic'"):
        levels(SCHEDULE, "magic", 10)
    with pytest.raises(RequestError, match=r"one of default, .* got 'even'"):
        levels(SCHEDULE, "ddim", 10, "even")


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm_solver"])
def test_strength_takes_its_share_of_the_moves(name):
    walk = levels(SCHEDULE, name, 50)
    start, rest = tail(walk, 0.75, name)
    assert rest == walk[-38:]
    assert start == (walk[-39] if name == "ddim" else walk[-38])
    assert tail(levels(SCHEDULE, name, 50, "karras"), 0.75, name, spacing="karras").start.sigma == pytest.approx(
        levels(SCHEDULE, name, 50, "karras")[-38].sigma
    )


def test_strength_counts_the_steps_that_were_asked_for():
    walk = levels(SCHEDULE, "ddim", 30)
    assert len(walk) == 32
    assert len(tail(walk, 0.75, "ddim", steps=30).levels) == 23


@pytest.mark.parametrize("name", NAMES)
def test_strength_goes_from_the_picture_itself_to_noise_alone(name):
    walk = levels(SCHEDULE, name, 20)
    start, rest = tail(walk, 0.0, name)
    assert start == CLEAN and len(rest) == 1
    assert tail(walk, 0.01, name).start == CLEAN
    start, rest = tail(walk, 1.0, name)
    assert rest == walk and start.alpha == 0
    noise = torch.ones(2)
    torch.testing.assert_close(start.sigma * noise, SAMPLERS[name].start(noise, walk[0]))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(RequestError, match="strength must be 0 to 1"):
        tail(levels(SCHEDULE, "ddim", 10), strength, "ddim")


def test_two_models_meet_in_the_first_level_of_the_second():
    path = [*(Level(t, 0.6, 0.8) for t in (900, 500, 200, 100)), CLEAN]
    assert cut(path, 0.8, 1000) == (path[:4], path[3:])  # 200 is still the first's, as with diffusers
    assert cut(path, 0.3, 1000) == (path[:2], path[1:])
    assert cut(path, 0.0, 1000) == (path[:1], path)
    assert cut(path, 1.0, 1000) == (path, path[-1:])
    with pytest.raises(RequestError, match=r"0 to 1, got 1\.2"):
        cut(path, 1.2, 1000)
