"""The samplers by name, the levels that each walks down, and where image-to-image joins in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import RequestError
from ldm.sampling import dpm, karras, vp
from ldm.sampling.denoiser import Denoiser, denoiser
from ldm.sampling.guidance import Away, Guidance, Told, ask, guide
from ldm.sampling.prediction import CLEAN, Level, Prediction, to_prediction
from ldm.sampling.schedule import Schedule, make_beta_schedule
from ldm.sampling.tiles import tiled

__all__ = [
    "CLEAN", "SAMPLERS", "SPACINGS", "Away", "Denoiser", "Guidance", "Level", "Prediction", "Sampler", "Schedule",
    "Tail", "Told", "ask", "cut", "denoiser", "guide", "levels", "make_beta_schedule", "tail", "tiled", "to_prediction",
]

SPACINGS = ("default", "karras", "exponential", "trailing")


@dataclass(frozen=True)
class Sampler:
    """One way down a list of levels.

    walk: the generator, (denoise, x, levels, *, ...) -> each latent; family: vp, dpm or karras, whose habits it keeps;
    spacing: (schedule, steps) -> its own levels; takes_eta: whether DDIM's eta means anything to it.
    """

    walk: Callable[..., Iterator[Tensor]]
    family: str
    spacing: Callable[[Schedule, int], list[Level]]
    takes_eta: bool = False

    def noise_scale(self, level: Level) -> float:
        """How much noise alone makes a latent of `level`: k-diffusion scales by its sigma, CompVis does not."""
        return level.sigma if self.family == "karras" else 1.0

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The latent (b, c, h, w) to begin with at `level` where there is nothing but noise."""
        return self.noise_scale(level) * noise

    def __call__(
        self,
        denoise: vp.Denoise,
        x: Tensor,
        levels: Sequence[Level],
        schedule: Schedule,
        *,
        eta: float = 0.0,
        draw: vp.Draw = torch.randn_like,
        **options,
    ) -> Iterator[Tensor]:
        """Walk, with those of eta, draw and `schedule.at` that the walk asks for; options: its own, such as order=3.

        Raises RequestError for an eta that would change nothing.
        """
        if eta and not self.takes_eta:
            takers = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.takes_eta)
            raise RequestError(f"eta is for {takers} alone, got eta {eta} for {self.walk.__name__}")
        offered = {"draw": draw, "at": schedule.at} | ({"eta": eta} if self.takes_eta else {})
        taken = {name: offered[name] for name in signature(self.walk).parameters if name in offered}
        return self.walk(denoise, x, levels, **taken, **options)


SAMPLERS = {
    "ddpm": Sampler(vp.sample_ddpm, "vp", Schedule.ancestral),
    "ddim": Sampler(vp.sample_ddim, "vp", Schedule.uniform, takes_eta=True),
    "plms": Sampler(vp.sample_plms, "vp", Schedule.uniform),
    "dpm_solver": Sampler(dpm.sample_dpm_solver, "dpm", Schedule.time_uniform),
    "dpmpp_2m": Sampler(karras.sample_dpmpp_2m, "karras", Schedule.sigma_uniform),
    "dpmpp_2m_sde": Sampler(karras.sample_dpmpp_2m_sde, "karras", Schedule.sigma_uniform),
    "dpmpp_sde": Sampler(karras.sample_dpmpp_sde, "karras", Schedule.sigma_uniform),
    "euler": Sampler(karras.sample_euler, "karras", Schedule.sigma_uniform),
    "euler_a": Sampler(karras.sample_euler_a, "karras", Schedule.sigma_uniform),
    "heun": Sampler(karras.sample_heun, "karras", Schedule.sigma_uniform),
    "lms": Sampler(karras.sample_lms, "karras", Schedule.sigma_uniform),
    "dpm2": Sampler(karras.sample_dpm2, "karras", Schedule.sigma_uniform),
    "dpm2_a": Sampler(karras.sample_dpm2_a, "karras", Schedule.sigma_uniform),
    "dpmpp_2s_a": Sampler(karras.sample_dpmpp_2s_a, "karras", Schedule.sigma_uniform),
    "unipc": Sampler(dpm.sample_unipc, "dpm", Schedule.time_uniform),
}


def named(sampler: str) -> Sampler:
    """The sampler of this name. Raises RequestError where there is none."""
    if sampler not in SAMPLERS:
        raise RequestError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    return SAMPLERS[sampler]


def levels(schedule: Schedule, sampler: str, steps: int, spacing: str = "default") -> list[Level]:
    """The levels of a walk, noisiest first, the last one only a target: `steps` moves.

    default is the sampler's own spacing: CompVis' for ddpm, ddim and plms (which makes a few more moves where `steps`
    does not divide the schedule), even float timesteps for dpm_solver and unipc, k-diffusion's for the rest.
    """
    own = named(sampler).spacing
    match spacing:
        case "default":
            return own(schedule, steps)
        case "karras":
            return schedule.karras(steps)
        case "exponential":
            return schedule.exponential(steps)
        case "trailing":
            return schedule.trailing(steps)
    raise RequestError(f"schedule must be one of {', '.join(SPACINGS)}, got {spacing!r}")


class Tail(NamedTuple):
    """Where image-to-image joins a walk: from x = start.alpha * x0 + start.sigma * noise down `levels`."""

    start: Level
    levels: list[Level]


def tail(
    levels: Sequence[Level], strength: float, sampler: str, steps: int | None = None, spacing: str = "default"
) -> Tail:
    """The last int(strength * steps) moves of what `levels` made, and the level to noise the clean latent to.

    strength: 0 walks nothing from the clean latent, 1 walks everything from noise alone (start.alpha is 0 then);
    steps: what `levels` was asked for, where it made more (ddim and plms may).
    """
    if not 0 <= strength <= 1:
        raise RequestError(f"strength must be 0 to 1, got {strength}")
    moves = len(levels) - 1
    if strength == 1:
        return Tail(Level(levels[0].t, 0.0, named(sampler).noise_scale(levels[0])), list(levels))
    first = moves - int(strength * (steps or moves))
    if first == moves:
        return Tail(CLEAN, [levels[-1]])
    # CompVis noises to one level above the first that it walks.
    above = first - 1 if named(sampler).family == "vp" and spacing == "default" else first
    return Tail(levels[above], list(levels[first:]))


def cut(levels: Sequence[Level], share: float, trained: int) -> tuple[list[Level], list[Level]]:
    """The levels that a first and a second model walk, which meet in one: the second begins at the first level whose
    timestep is under (1 - share) of those that were `trained`.

    share: 0 leaves all to the second, 1 to the first. Either part may be a single level, from which nothing is walked.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"the share of the first model must be 0 to 1, got {share}")
    limit = round((1 - share) * trained)
    k = next((k for k, level in enumerate(levels) if level.t < limit), len(levels) - 1)
    return list(levels[:k + 1]), list(levels[k:])
