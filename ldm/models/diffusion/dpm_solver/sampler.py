"""DPMSolverSampler: the original's class and signature over ldm.sampling."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.models.diffusion.classic import ModelSampler, progress, warn_of_batch_size
from ldm.sampling.denoiser import timestep
from ldm.sampling.dpm import sample_dpm_solver
from ldm.sampling.prediction import Level, Prediction
from ldm.sampling.schedule import Schedule


class DPMSolverSampler(ModelSampler):
    """DPM-Solver++(2M) over even float timesteps (arXiv 2211.01095)."""

    def __init__(self, model, device: torch.device | str | None = None, **kwargs):
        super().__init__(model, device)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float())

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning=None,
        callback: Callable[[int], None] | None = None,
        normals_sequence=None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector=None,
        corrector_kwargs=None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning=None,
        dynamic_threshold: float | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Latents (b, c, h, w) in S steps from x_T or noise, and None in place of the intermediates.

        shape: (c, h, w). mask: 1 where x0 (b, c, h, w) is kept. The solver draws no noise, so that eta, temperature and
        noise_dropout change nothing.
        """
        if mask is not None and x0 is None:
            raise ValueError("a mask needs x0, the latents (b, c, h, w) that it keeps")
        warn_of_batch_size(conditioning, batch_size)
        x = torch.randn((batch_size, *shape), device=self.device) if x_T is None else x_T.clone()
        levels = Schedule(self.alphas_cumprod).time_uniform(S)
        clean = x

        def denoise(x: Tensor, level: Level) -> Prediction:
            nonlocal clean
            pred = self._predict(
                x, conditioning, timestep(level.t, x), level, unconditional_conditioning, unconditional_guidance_scale,
                score_corrector, corrector_kwargs,
            )  # fmt: skip
            pred = self._settle(pred, quantize_x0, dynamic_threshold)
            clean = pred.x0
            return pred

        walk = sample_dpm_solver(denoise, x, levels)
        for i, level in enumerate(progress(levels[:-1], type(self).__name__, verbose)):
            if mask is not None:
                kept = level.alpha * x0 + level.sigma * torch.randn_like(x0)
                x.copy_(kept * mask + (1.0 - mask) * x)
            x = next(walk)
            if callback:
                callback(i)
            if img_callback:
                img_callback(clean, i)
        return x, None
