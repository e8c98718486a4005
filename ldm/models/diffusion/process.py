"""The Gaussian process that diffusion models undo, on the buffers that checkpoints carry (Ho et al. 2020)."""

import numpy as np
import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.modules.diffusionmodules.util import extract_into_tensor, schedule_buffers
from ldm.sampling.schedule import make_beta_schedule

PARAMETERIZATIONS = ("eps", "x0", "v")


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alphas_cumprod) to end at 0 and begin where it did (Lin et al. 2024, algorithm 1)."""
    root = np.cumprod(1.0 - betas) ** 0.5
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - kept / np.append(1.0, kept[:-1])


class GaussianProcess:
    """The schedule buffers and the closed forms around them, mixed into a module.

    x_start, x_t, noise, v: (b, ...); t: (b,) int64. Reads `parameterization`, `v_posterior` and `zero_terminal_snr`.
    """

    parameterization = "eps"
    v_posterior = 0.0
    zero_terminal_snr = False
    saves_schedule = True  # whether the buffers are a part of the state dict
    # What must stay float32 when the module is cast: half precision has no room for the first alphas_cumprod.
    float32_buffers = frozenset({"lvlb_weights", "logvar", "scale_factor"})

    def register_schedule(
        self,
        given_betas=None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the twelve float32 buffers (timesteps,) of the checkpoint format, computed in float64.

        posterior_*: q(x_{t-1} | x_t, x_0) (eqs. 6 and 7), its variance mixed with beta by v_posterior. lvlb_weights,
        the weight of each step in the variational bound (eq. 12), is no part of the state dict.
        """
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        if self.zero_terminal_snr:
            if self.parameterization == "eps":
                raise ConfigError("zero_terminal_snr needs parameterization v or x0: eps says nothing of pure noise")
            betas = rescale_zero_terminal_snr(betas)
        buffers = schedule_buffers(betas)
        alphas, kept, before = 1.0 - betas, buffers["alphas_cumprod"], buffers["alphas_cumprod_prev"]
        variance = (1 - self.v_posterior) * betas * (1 - before) / (1 - kept) + self.v_posterior * betas
        buffers |= {
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
            "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - kept),
        }
        match self.parameterization:
            case "eps":
                bound = betas[1:] ** 2 / (2 * variance[1:] * alphas[1:] * (1 - kept[1:]))
            case "x0":
                bound = 0.5 * np.sqrt(kept[1:]) / (2 - kept[1:])
            case "v":
                bound = np.ones_like(betas[1:])
        # The first step has no variance to divide by; it borrows the weight of the second.
        bound = np.append(bound[:1], bound)

        self.num_timesteps = len(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        self.float32_buffers = self.float32_buffers | buffers.keys()
        with torch.device("cpu"):  # real numbers even while the weights are built on meta
            for name, values in buffers.items():
                tensor = torch.tensor(values, dtype=torch.float32)
                self.register_buffer(name, tensor, persistent=self.saves_schedule)
            self.register_buffer("lvlb_weights", torch.tensor(bound, dtype=torch.float32), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """Move the schedule with the module, but never cast it."""
        exact = {name: buffer for name, buffer in self._buffers.items() if name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0) (eq. 4)."""
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = extract_into_tensor(1.0 - self.alphas_cumprod, t, x_start.shape)
        return mean, variance, extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise (eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._alpha(t, x_start) * x_start + self._sigma(t, x_start) * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity alpha * noise - sigma * x (Salimans & Ho 2022, app. D)."""
        return self._alpha(t, x) * noise - self._sigma(t, x) * x

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = (x_t - sigma * noise) / alpha."""
        scale = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape)
        return scale * x_t - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = alpha * x_t - sigma * v."""
        return self._alpha(t, x_t) * x_t - self._sigma(t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """noise = alpha * v + sigma * x_t."""
        return self._alpha(t, x_t) * v + self._sigma(t, x_t) * x_t

    def predict_start(self, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The clean x_0 that a network output implies under this model's parameterization."""
        match self.parameterization:
            case "eps":
                return self.predict_start_from_noise(x_t, t, out)
            case "v":
                return self.predict_start_from_z_and_v(x_t, t, out)
        return out

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is to put out for x_t."""
        match self.parameterization:
            case "eps":
                return noise
            case "v":
                return self.get_v(x_start, noise, t)
        return x_start

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (eqs. 6 and 7)."""
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, x_t.shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)

    def step_noise(self, mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} = mean + std * noise; just the mean at t = 0."""
        last = (t == 0).reshape(len(t), *(1,) * (mean.ndim - 1))
        return torch.where(last, mean, mean + (0.5 * log_variance).exp() * noise)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod), (b,)."""
        kept = self.alphas_cumprod[t]
        return kept / (1 - kept)

    def _alpha(self, t: Tensor, x: Tensor) -> Tensor:
        return extract_into_tensor(self.sqrt_alphas_cumprod, t, x.shape)

    def _sigma(self, t: Tensor, x: Tensor) -> Tensor:
        return extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.shape)
