"""NoiseScheduleVP, model_wrapper and DPM_Solver: the names of the DPM-Solver authors over ldm.sampling.

Time here runs over [1 / N, 1], where N is the number of trained steps: t = (n + 1) / N at the trained step n.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ldm.sampling.denoiser import timestep
from ldm.sampling.dpm import multistep, sample_dpm_solver
from ldm.sampling.guidance import guide
from ldm.sampling.prediction import Level, Prediction, to_prediction
from ldm.sampling.schedule import Schedule

KINDS = {"noise": "eps", "x_start": "x0", "v": "v"}


class NoiseScheduleVP:
    """The continuous schedule through trained levels; times, and what they give, are tensors of any shape."""

    T = 1.0

    def __init__(self, schedule: str = "discrete", betas: Tensor | None = None, alphas_cumprod: Tensor | None = None):
        if schedule != "discrete":
            raise ValueError(f"schedule must be discrete, the levels that a model was trained on, got {schedule!r}")
        if alphas_cumprod is None:
            if betas is None:
                raise ValueError("a discrete schedule needs betas or alphas_cumprod")
            alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.schedule = schedule
        self.trained = Schedule(alphas_cumprod)
        self.total_N = len(self.trained)

    def level(self, t: float) -> Level:
        """The level of a time; its own t is the network's timestep t * N - 1."""
        return self.trained.dpm_level(min(max(t * self.total_N - 1, 0), self.total_N - 1))

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """log(alpha)."""
        return self.marginal_alpha(t).log()

    def marginal_alpha(self, t: Tensor) -> Tensor:
        return self._read(t, lambda level: level.alpha)

    def marginal_std(self, t: Tensor) -> Tensor:
        """sigma."""
        return self._read(t, lambda level: level.sigma)

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma)."""
        return self._read(t, lambda level: level.log_snr)

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """The time of a lambda."""
        log_alphas = 0.5 * np.log(self.trained.alphas_cumprod)
        wanted = -0.5 * np.logaddexp(0, -2 * lamb.detach().double().cpu().numpy())
        steps = np.interp(wanted, log_alphas[::-1], np.arange(self.total_N)[::-1])
        return torch.as_tensor((steps + 1) / self.total_N).to(lamb)

    def _read(self, t: Tensor, value: Callable[[Level], float]) -> Tensor:
        return torch.tensor([value(self.level(one)) for one in t.flatten().tolist()]).reshape(t.shape).to(t)


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: Mapping | None = None,
    guidance_type: str = "uncond",
    condition=None,
    unconditional_condition=None,
    guidance_scale: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise in x (b, c, h, w) as a function of it and the time (b,), from model(x, timestep, condition).

    model_type: what the model predicts, noise, x_start or v; guidance_type: uncond or classifier-free.
    """
    if model_type not in KINDS or guidance_type not in ("uncond", "classifier-free"):
        raise ValueError(f"model_type must be one of {', '.join(KINDS)} and guidance_type uncond or classifier-free, "
                         f"got {model_type!r} and {guidance_type!r}")

    def apply_model(x: Tensor, t: Tensor, cond) -> Tensor:
        return model(x, t, *([] if cond is None else [cond]), **(model_kwargs or {}))

    if guidance_type == "uncond":
        condition = unconditional_condition = None
    predict = guide(apply_model, condition, unconditional_condition, guidance_scale)

    def noise(x: Tensor, t: Tensor) -> Tensor:
        level = noise_schedule.level(float(t.flatten()[0]))
        return to_prediction(KINDS[model_type], x, predict(x, timestep(level.t, x)), level).eps

    return noise


class DPM_Solver:
    """DPM-Solver (arXiv 2206.00927), or with predict_x0 DPM-Solver++ (arXiv 2211.01095), of what `model_wrapper` gives.

    thresholding: with predict_x0, clip clean pixels at their 99.5 % quantile, if over max_val, and scale to it.
    """

    def __init__(
        self,
        model_fn: Callable[[Tensor, Tensor], Tensor],
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ):
        if thresholding and not predict_x0:
            raise ValueError("thresholding needs predict_x0=True: there are no pixels to clip in the noise")
        self.model = model_fn
        self.noise_schedule = noise_schedule
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.max_val = max_val

    def get_time_steps(self, skip_type: str, t_T: float, t_0: float, N: int, device=None) -> Tensor:
        """N + 1 times from t_T to t_0: even in time (time_uniform), its root (time_quadratic) or lambda (logSNR)."""
        match skip_type:
            case "time_uniform":
                return torch.linspace(t_T, t_0, N + 1, device=device)
            case "time_quadratic":
                return torch.linspace(t_T**0.5, t_0**0.5, N + 1, device=device) ** 2
            case "logSNR":
                ends = self.noise_schedule.marginal_lambda(torch.tensor([t_T, t_0])).tolist()
                return self.noise_schedule.inverse_lambda(torch.linspace(*ends, N + 1, device=device))
        raise ValueError(f"skip_type must be time_uniform, time_quadratic or logSNR, got {skip_type!r}")

    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Solve from x (b, c, h, w) at t_start, by default 1, to t_end, by default 1 / N, in `steps` evaluations.

        denoise_to_zero: ask once more for the clean latent at the end.
        """
        if solver_type != "dpm_solver":
            raise ValueError(f"solver_type must be dpm_solver, got {solver_type!r}")
        total = self.noise_schedule.total_N
        times = self.get_time_steps(skip_type, t_start or self.noise_schedule.T, t_end or 1 / total, steps)
        levels = [self.noise_schedule.level(t) for t in times.double().tolist()]

        def denoise(x: Tensor, level: Level) -> Prediction:
            time = torch.full((len(x),), (level.t + 1) / total, device=x.device)
            x0, eps = to_prediction("eps", x, self.model(x, time), level)
            return Prediction(self._threshold(x0) if self.thresholding else x0, eps)

        def exchanged(x: Tensor, level: Level) -> Prediction:
            x0, eps = denoise(x, exchange(level))
            return Prediction(x0=eps, eps=x0)

        network, path = (denoise, levels) if self.predict_x0 else (exchanged, [exchange(level) for level in levels])
        if method == "multistep" and not lower_order_final:
            walk = multistep(network, x, path, order)
        else:
            walk = sample_dpm_solver(network, x, path, order=order, method=method)
        for latent in walk:
            x = latent
        return denoise(x, levels[-1]).x0 if denoise_to_zero else x

    def _threshold(self, x0: Tensor) -> Tensor:
        limit = x0.flatten(1).abs().quantile(0.995, dim=1).clamp(min=self.max_val)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) * self.max_val / limit


def exchange(level: Level) -> Level:
    """Alpha and sigma exchanged, under which the solver for x0 is the solver for eps."""
    return Level(level.t, level.sigma, level.alpha)
