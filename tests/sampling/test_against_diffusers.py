"""Each sampler beside its namesake in diffusers: one denoiser, one starting point, one seed, the same timesteps."""

from itertools import pairwise

import diffusers
import pytest
import torch
from sampling.analytic import SCHEDULE, denoise, last
from support import assert_matches

from ldm.sampling import CLEAN, SAMPLERS, Level

# Numpy warns of how diffusers copies its arrays.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# At trained timesteps every library means the same sigma.
LEADING = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
LEAN = {"skip_prk_steps": True, "steps_offset": 1}
STEPS = 20

SAME = {
    "plms": (diffusers.PNDMScheduler, BETAS | LEAN, {}),
    "ddim": (diffusers.DDIMScheduler, LEADING | {"clip_sample": False, "set_alpha_to_one": False}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, LEADING, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, LEADING, {}),
    "heun": (diffusers.HeunDiscreteScheduler, LEADING, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, LEADING, {}),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, LEADING, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, LEADING, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, LEADING | {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm_solver": (diffusers.DPMSolverMultistepScheduler, LEADING, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, LEADING | {"solver_type": "bh2"}, {}),
}
THIRD = LEADING | {"solver_order": 3}
OPTIONS = [
    *((name, *same, STEPS) for name, same in SAME.items()),
    ("dpm_solver", diffusers.DPMSolverMultistepScheduler, THIRD, {"order": 3}, STEPS),
    ("dpm_solver", diffusers.DPMSolverMultistepScheduler, THIRD, {"order": 3}, 10),
    ("dpm_solver", diffusers.DPMSolverSinglestepScheduler, BETAS, {"method": "singlestep"}, STEPS),
    ("dpm_solver", diffusers.DPMSolverSinglestepScheduler, BETAS, {"method": "singlestep"}, STEPS + 1),
    ("unipc", diffusers.UniPCMultistepScheduler, THIRD, {"order": 3}, STEPS),
    ("unipc", diffusers.UniPCMultistepScheduler, LEADING, {}, 5),
]


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def walk_theirs(scheduler, start: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = denoise(scheduler.scale_model_input(x, t), SCHEDULE.level(float(t))).eps
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(eps, t, x, **extra).prev_sample
    return x


def levels_of(scheduler, end: Level) -> list[Level]:
    """The trained timesteps of a scheduler, without the repeats and the points between of those of second order."""
    whole = [int(t) for t in dict.fromkeys(scheduler.timesteps.tolist()) if float(t).is_integer()]
    return [*map(SCHEDULE.level, whole), end]


def same_start(scheduler, levels: list[Level]) -> torch.Tensor:
    """Their starting point as a latent x = alpha * x0 + sigma * eps: some keep x / alpha instead."""
    scale = float(scheduler.init_noise_sigma)
    return noise() * (1.0 if scale == 1 else scale * levels[0].alpha)


@pytest.mark.parametrize("name, scheduler, settings, options, steps", OPTIONS)
def test_the_samplers_of_diffusers_give_the_same_latents(name, scheduler, settings, options, steps):
    theirs = scheduler(**settings)
    theirs.set_timesteps(steps)
    levels = levels_of(theirs, SCHEDULE.level(0) if name in ("plms", "ddim") else CLEAN)
    assert len(levels) == steps + 1
    want = walk_theirs(theirs, noise(), torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=draws)

    walk = SAMPLERS[name](denoise, same_start(theirs, levels), levels, SCHEDULE, draw=draw, **options)
    assert_matches(last(walk), want)


def test_ddim_with_eta_gives_the_same_latents_as_diffusers():
    theirs = diffusers.DDIMScheduler(**LEADING, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(STEPS)
    levels = levels_of(theirs, SCHEDULE.level(0))
    x, generator, draws = noise(), *(torch.Generator().manual_seed(7) for _ in range(2))
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, SCHEDULE.level(int(t))).eps, t, x, eta=0.6, generator=generator).prev_sample
    walk = SAMPLERS["ddim"](
        denoise, noise(), levels, SCHEDULE, eta=0.6, draw=lambda x: torch.randn(x.shape, generator=draws)
    )
    assert_matches(last(walk), x)


def test_lms_gives_the_same_latents_as_diffusers():
    pytest.importorskip("scipy")
    theirs = diffusers.LMSDiscreteScheduler(**LEADING)
    theirs.set_timesteps(STEPS)
    levels = levels_of(theirs, CLEAN)
    walk = SAMPLERS["lms"](denoise, same_start(theirs, levels), levels, SCHEDULE)
    assert_matches(last(walk), walk_theirs(theirs, noise()))


def test_dpmpp_sde_gives_the_same_latents_as_diffusers_along_one_brownian_path():
    pytest.importorskip("torchsde")
    theirs = diffusers.DPMSolverSDEScheduler(**LEADING)
    theirs.set_timesteps(STEPS)
    levels = levels_of(theirs, CLEAN)
    sigmas = [level.edm_sigma for level in levels[:-1]]
    nodes = sorted([*sigmas, *((a * b) ** 0.5 for a, b in pairwise(sigmas))], reverse=True)
    draws = torch.Generator().manual_seed(7)
    steps = [torch.randn(noise().shape, generator=draws) for _ in nodes[1:]]
    path = [torch.zeros_like(noise())]
    for step, high, low in zip(steps, nodes[:-1], nodes[1:]):
        path.append(path[-1] + (high - low) ** 0.5 * step)

    def between(start: float, end: float) -> torch.Tensor:
        high, low = (min(range(len(nodes)), key=lambda i: abs(nodes[i] - float(sigma))) for sigma in (start, end))
        return (path[low] - path[high]) / abs(nodes[low] - nodes[high]) ** 0.5

    theirs.noise_sampler = between
    given = iter(steps)
    walk = SAMPLERS["dpmpp_sde"](denoise, same_start(theirs, levels), levels, SCHEDULE, draw=lambda x: next(given))
    assert_matches(last(walk), walk_theirs(theirs, noise()))
