"""PLMSSampler: the original's class and signatures over ldm.sampling."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.errors import RequestError
from ldm.models.diffusion.classic import ClassicSampler
from ldm.sampling.prediction import Level, Prediction
from ldm.sampling.vp import move, plms_step


class PLMSSampler(ClassicSampler):
    """Pseudo linear multistep (Liu et al. 2022); each step goes through `self.p_sample_plms`."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """As in DDIM. Raises RequestError for any eta but 0, which PLMS has no use for."""
        if ddim_eta != 0:
            raise RequestError(f"ddim_eta must be 0 for PLMS, got {ddim_eta}; use DDIM with it")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def _stepper(self, timesteps: np.ndarray) -> Callable[..., tuple[Tensor, Tensor]]:
        old_eps: list[Tensor] = []

        def step(x: Tensor, cond, t: Tensor, index: int, **options) -> tuple[Tensor, Tensor]:
            t_next = torch.full_like(t, int(timesteps[max(index - 1, 0)]))
            x, pred_x0, eps = self.p_sample_plms(x, cond, t, index=index, old_eps=old_eps, t_next=t_next, **options)
            old_eps.append(eps)
            del old_eps[:-3]
            return x, pred_x0

        return step

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning=None,
        old_eps: Sequence[Tensor] = (),
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of `index`, counted up from the last: (the next x, the estimate of x0, eps at t), all (b, c, h, w).

        old_eps: what the up to three steps before gave, oldest first; t, t_next: (b,).
        """
        now, then = self._levels(index, use_original_steps)
        draw = self._draw(repeat_noise, temperature, noise_dropout)

        def denoise(x: Tensor, level: Level) -> Prediction:
            return self._predict(
                x, c, t if level is now else t_next, level, unconditional_conditioning, unconditional_guidance_scale,
                score_corrector, corrector_kwargs,
            )  # fmt: skip

        def advance(pred: Prediction) -> Tensor:
            return move(self._settle(pred, quantize_denoised, dynamic_threshold), now, then, draw=draw)

        x, pred, eps = plms_step(denoise, x, now, then, old_eps, advance)
        return x, self._settle(pred, quantize_denoised, dynamic_threshold).x0, eps
