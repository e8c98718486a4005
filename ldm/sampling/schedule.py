"""The noise schedule: betas, the level of any timestep or sigma, and the lists of levels that samplers walk down."""

import logging
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.errors import RequestError
from ldm.sampling.prediction import CLEAN, Level

logger = logging.getLogger(__name__)


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """The betas (n_timestep,) in float64 by their historical names: "linear" is linear in sqrt(beta).

    cosine: Nichol & Dhariwal 2021, eq. 17, capped at 0.999.
    """
    match schedule:
        case "linear":
            return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep) ** 2
        case "sqrt_linear":
            return np.linspace(linear_start, linear_end, n_timestep)
        case "sqrt":
            return np.linspace(linear_start, linear_end, n_timestep) ** 0.5
        case "cosine" | "squaredcos_cap_v2":
            angle = (np.arange(n_timestep + 1) / n_timestep + cosine_s) / (1 + cosine_s) * np.pi / 2
            alphas_cumprod = np.cos(angle) ** 2
            return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    raise ValueError(f"beta schedule must be linear, cosine, sqrt_linear or sqrt, got {schedule!r}")


def make_ddim_timesteps(
    ddim_discr_method: str,
    num_ddim_timesteps: int,
    num_ddpm_timesteps: int,
    verbose: bool = True,
) -> np.ndarray:
    """The trained timesteps, ascending, that DDIM visits: "uniform" or "quad" spacing.

    Raises RequestError for a step count outside 1 .. num_ddpm_timesteps.
    """
    check_steps(num_ddim_timesteps, num_ddpm_timesteps)
    match ddim_discr_method:
        case "uniform":
            # One up, as CompVis has it, and more than S steps where S does not divide the schedule. Where that runs
            # past the end (S = 3, 9, 101 to 111, 251 to 333, over 500 ...), exactly S steps evenly spread.
            steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps) + 1
            if steps[-1] >= num_ddpm_timesteps:
                steps = np.arange(num_ddim_timesteps) * num_ddpm_timesteps // num_ddim_timesteps
                steps = steps + (num_ddim_timesteps < num_ddpm_timesteps)
        case "quad":
            steps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(np.int64) + 1
        case _:
            raise ValueError(f"DDIM spacing must be uniform or quad, got {ddim_discr_method!r}")
    if verbose:
        logger.info("selected timesteps for the DDIM sampler: %s", steps)
    return steps


def make_ddim_sampling_parameters(alphacums, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True):
    """(sigmas, alphas, alphas_prev) of a DDIM walk, ascending in t (Song et al. 2021, eq. 16).

    alphacums: (t,) array or tensor, of which alphas is the selection; the other two are float64 arrays.
    """
    alphas = alphacums[ddim_timesteps]
    here = np.asarray(alphas, dtype=np.float64)
    alphas_prev = np.asarray([float(alphacums[0]), *here[:-1]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - here) * (1 - here / alphas_prev))
    if verbose:
        logger.info("selected alphas for the DDIM sampler: a_t: %s; a_(t-1): %s", alphas, alphas_prev)
        logger.info("for eta = %s this gives the sigma_t schedule %s", eta, sigmas)
    return sigmas, alphas, alphas_prev


def check_steps(steps: int, most: int) -> None:
    """Reject a number of steps that the schedule does not have."""
    if not 1 <= steps <= most:
        raise RequestError(f"the number of steps must be 1 to {most}, got {steps}")


class Schedule:
    """The levels that a model was trained on, and those between them.

    alphas_cumprod: (t,) tensor, array or list, falling from nearly 1; its last entry may be 0 (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: Tensor | np.ndarray | Sequence[float]):
        if isinstance(alphas_cumprod, Tensor):
            alphas_cumprod = alphas_cumprod.detach().cpu().double().numpy()
        self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)
        with np.errstate(divide="ignore"):
            self.log_sigmas = 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, t: float) -> Level:
        """The level of timestep t in [0, len - 1]; between trained steps log(sigma / alpha) is linear in t."""
        if float(t).is_integer():
            alpha_bar = float(self.alphas_cumprod[int(t)])
            return Level(int(t), alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        return _level(float(t), math.exp(np.interp(t, np.arange(len(self)), self.log_sigmas)))

    def dpm_level(self, t: float) -> Level:
        """As `level`, but between trained steps log(alpha) is linear in t: how DPM-Solver reads a float t."""
        if float(t).is_integer():
            return self.level(t)
        with np.errstate(divide="ignore"):
            alpha = math.exp(np.interp(t, np.arange(len(self)), 0.5 * np.log(self.alphas_cumprod)))
        return Level(float(t), alpha, (1 - alpha**2) ** 0.5)

    def at(self, edm_sigma: float) -> Level:
        """The level where sigma / alpha is `edm_sigma`: the inverse of `level`; t stays within the trained range."""
        if not edm_sigma:
            return CLEAN
        return _level(float(np.interp(math.log(edm_sigma), self.log_sigmas, np.arange(len(self)))), edm_sigma)

    def uniform(self, steps: int) -> list[Level]:
        """DDIM's even spacing over trained steps, down to the first of them (Song et al. 2021)."""
        timesteps = make_ddim_timesteps("uniform", steps, len(self), verbose=False)
        return [self.level(int(t)) for t in (*timesteps[::-1], 0)]

    def ancestral(self, steps: int) -> list[Level]:
        """The even spacing of `uniform`, down to the clean latent; all the steps make the chain of Ho et al. 2020."""
        return [*self.uniform(steps)[:-1], CLEAN]

    def time_uniform(self, steps: int) -> list[Level]:
        """Even float timesteps from the last trained step, the first being the target: DPM-Solver's default."""
        check_steps(steps, len(self))
        return [self.dpm_level(float(t)) for t in np.linspace(len(self) - 1, 0, steps + 1)]

    def sigma_uniform(self, steps: int) -> list[Level]:
        """Even float timesteps from the last trained step to the first, then clean: k-diffusion's default."""
        check_steps(steps, len(self))
        return [*(self.level(float(t)) for t in np.linspace(len(self) - 1, 0, steps)), CLEAN]

    def karras(self, steps: int, rho: float = 7.0) -> list[Level]:
        """Even in (sigma / alpha)**(1 / rho), then the clean latent (Karras et al. 2022, eq. 5)."""
        noisiest, quietest = (sigma ** (1 / rho) for sigma in self._sigma_range(steps))
        return [*(self.at(float(root) ** rho) for root in np.linspace(noisiest, quietest, steps)), CLEAN]

    def exponential(self, steps: int) -> list[Level]:
        """Even in log(sigma / alpha), then the clean latent."""
        noisiest, quietest = self._sigma_range(steps)
        return [*(self.at(float(sigma)) for sigma in np.geomspace(noisiest, quietest, steps)), CLEAN]

    def trailing(self, steps: int) -> list[Level]:
        """Trained steps counted down from the very last one, then the clean latent (Lin et al. 2024, sec. 3.3)."""
        check_steps(steps, len(self))
        return [*(self.level(round(len(self) * (1 - i / steps)) - 1) for i in range(steps)), CLEAN]

    def _sigma_range(self, steps: int) -> tuple[float, float]:
        check_steps(steps, len(self))
        if not self.alphas_cumprod[-1]:
            raise RequestError("karras and exponential spacing need a finite sigma, but this model starts from "
                               "pure noise (zero terminal SNR); use ddim or dpm_solver with another spacing")
        return math.exp(self.log_sigmas[-1]), math.exp(self.log_sigmas[0])


def _level(t: float, edm_sigma: float) -> Level:
    alpha = 1 / math.hypot(1, edm_sigma)
    return Level(t, alpha, edm_sigma * alpha if alpha else 1.0)
