"""DDIMSampler: the original's class and signatures over ldm.sampling."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.classic import ClassicSampler, progress
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.sampling.karras import sample_euler
from ldm.sampling.prediction import Level, Prediction
from ldm.sampling.vp import move


class DDIMSampler(ClassicSampler):
    """Denoising diffusion implicit models (Song et al. 2021); each step goes through `self.p_sample_ddim`."""

    def _stepper(self, timesteps: np.ndarray) -> Callable[..., tuple[Tensor, Tensor]]:
        def step(*args, **options) -> tuple[Tensor, Tensor]:
            x, pred_x0, *_ = self.p_sample_ddim(*args, **options)
            return x, pred_x0

        return step

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The step of `index`, counted up from the last: (the next x, the estimate of x0), (b, c, h, w); t: (b,)."""
        now, then = self._levels(index, use_original_steps)
        pred = self._predict(
            x, c, t, now, unconditional_conditioning, unconditional_guidance_scale, score_corrector, corrector_kwargs
        )
        pred = self._settle(pred, quantize_denoised, dynamic_threshold)
        draw = self._draw(repeat_noise, temperature, noise_dropout)
        return move(pred, now, then, self.ddim_eta, draw), pred.x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise clean latents (b, c, h, w) to the levels of the indices t (b,)."""
        alphas = self.alphas_cumprod if use_original_steps else self.ddim_alphas
        kept = extract_into_tensor(alphas, t, x0.shape)
        return kept.sqrt() * x0 + (1 - kept).sqrt() * (torch.randn_like(x0) if noise is None else noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning=None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Walk latents (b, c, h, w) down the last t_start steps."""
        x, _ = self._loop(
            x_latent,
            cond,
            self._timesteps(use_original_steps)[:t_start],
            callback=callback,
            use_original_steps=use_original_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )
        return x

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning=None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict]:
        """Find the noise that DDIM turns into x0 (b, c, h, w): t_enc steps up, eta 0 (Song et al. 2021, section 4.3).

        Returns the latents and {x_encoded, intermediate_steps}, and with return_intermediates as many `intermediates`.
        """
        timesteps = self._timesteps(use_original_steps)
        if t_enc > len(timesteps):
            raise ValueError(f"t_enc must be at most {len(timesteps)}, the number of steps, got {t_enc}")

        def denoise(x: Tensor, level: Level) -> Prediction:
            t = torch.full((len(x),), int(level.t), device=x.device)
            return self._predict(x, c, t, level, unconditional_conditioning, unconditional_guidance_scale)

        pairs = [self._levels(index, use_original_steps) for index in range(t_enc)]
        x, kept, kept_at = x0, [], []
        for i, (above, here) in enumerate(progress(pairs, "Encoding", verbose=True)):
            # The network is told the timestep that the step leads to, as the original does.
            (x,) = sample_euler(denoise, x, [here._replace(t=above.t), above])
            if return_intermediates and (i % max(t_enc // return_intermediates, 1) == 0 or i >= t_enc - 2):
                kept.append(x)
                kept_at.append(i)
            if callback:
                callback(i)
        encoded = {"x_encoded": x, "intermediate_steps": kept_at}
        return x, encoded | {"intermediates": kept} if return_intermediates else encoded

    def _timesteps(self, use_original_steps: bool) -> np.ndarray:
        return np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
