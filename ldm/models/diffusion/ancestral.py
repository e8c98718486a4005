"""Ancestral sampling of latents: every trained step, one draw each (Ho et al. 2020, algorithm 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.util import noise_like


def countdown(x: Tensor, steps: int, verbose: bool = True) -> Iterator[tuple[int, Tensor]]:
    """(i, t) for i = steps - 1 ... 0, where t (b,) holds i for each of a batch x; a bar on a terminal if `verbose`."""
    for i in tqdm(range(steps - 1, -1, -1), desc="Sampling t", disable=None if verbose else True):
        yield i, torch.full((len(x),), i, device=x.device)


def first(cond, count: int):
    """The first `count` entries of a conditioning: a tensor, or lists and dicts of them."""
    if isinstance(cond, Mapping):
        return {key: first(c, count) for key, c in cond.items()}
    if isinstance(cond, list):
        return [first(c, count) for c in cond]
    return cond if cond is None else cond[:count]


class AncestralSampling:
    """The reverse walk of a conditioned diffusion model; x, x0: (b, c, h, w), mask: 1 where x0 is kept, t: (b,).

    temperature scales the noise of each step, noise_dropout drops that share of it; quantize_denoised snaps each
    estimate of x_0 to a VQ codebook; score_corrector.modify_score(model, out, x, t, c, ...) edits each network output.
    """

    def p_mean_variance(
        self,
        x: Tensor,
        c,
        t: Tensor,
        clip_denoised: bool,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log variance of p(x_{t-1} | x_t, c), with return_x0 also the estimate of x_0."""
        out = self.apply_model(x, t, c)
        if score_corrector is not None:
            out = score_corrector.modify_score(self, out, x, t, c, **(corrector_kwargs or {}))
        x_start = self.predict_start(x, t, out)
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        if quantize_denoised:
            x_start, *_ = self.first_stage_model.quantize(x_start)
        moments = self.q_posterior(x_start, x, t)
        return (*moments, x_start) if return_x0 else moments

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
    ):
        """A draw of x_{t-1} given x_t and c; with return_x0 a pair of it and the estimate of x_0."""
        mean, _, log_variance, x_start = self.p_mean_variance(
            x, c, t, clip_denoised, quantize_denoised, True, score_corrector, corrector_kwargs
        )
        noise = temperature * noise_like(x.shape, x.device, repeat_noise)
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        x = self.step_noise(mean, log_variance, t, noise)
        return (x, x_start) if return_x0 else x

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ):
        """Latents of `shape` (b, c, h, w) from x_T or noise, from step start_T down; with return_intermediates also a
        list of the latents on the way, x_T first.
        """
        x = start = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        seen = [start]
        steps = min(n for n in (self.num_timesteps, timesteps, start_T) if n is not None)
        for i, x, _ in self._walk(start, cond, steps, verbose, mask, x0, quantize_denoised=quantize_denoised):
            if i % (log_every_t or self.log_every_t) == 0 or i == steps - 1:
                seen.append(x)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x, i)
        return (x, seen) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector=None,
        corrector_kwargs: Mapping | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Latents and the estimates of x_0 on the way; `shape` is (b, c, h, w), or (c, h, w) with a batch_size."""
        if batch_size is not None:
            shape, cond = (batch_size, *shape), first(cond, batch_size)
        x = start = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        seen = []
        steps = min(self.num_timesteps, start_T or self.num_timesteps)
        options = {"quantize_denoised": quantize_denoised, "temperature": temperature, "noise_dropout": noise_dropout,
                   "score_corrector": score_corrector, "corrector_kwargs": corrector_kwargs}  # fmt: skip
        for i, x, x_start in self._walk(start, cond, steps, verbose, mask, x0, **options):
            if i % (log_every_t or self.log_every_t) == 0 or i == steps - 1:
                seen.append(x_start)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(x, i)
        return x, seen

    def _walk(
        self, x: Tensor, cond, steps: int, verbose: bool, mask: Tensor | None, x0: Tensor | None, **options
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(i, x_i, estimate of x_0) after each of the steps i = steps - 1 ... 0; x0 shows through the mask."""
        if mask is not None and x0 is None:
            raise ValueError("a mask needs x0, the latents (b, c, h, w) that it keeps")
        for i, t in countdown(x, steps, verbose):
            c = self.noised_condition(cond, t)
            x, x_start = self.p_sample(x, c, t, clip_denoised=self.clip_denoised, return_x0=True, **options)
            if mask is not None:
                x = mask * self.q_sample(x0, t) + (1.0 - mask) * x
            yield i, x, x_start

    @torch.no_grad()
    def sample(
        self,
        cond,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs,
    ):
        """`p_sample_loop` of batch_size latents, of the model's own size unless `shape` is given."""
        shape = shape or (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(
            first(cond, batch_size), shape, return_intermediates, x_T, verbose, timesteps=timesteps,
            quantize_denoised=quantize_denoised, mask=mask, x0=x0,
        )  # fmt: skip

    @torch.no_grad()
    def sample_log(self, cond, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs):
        """Latents and intermediates by DDIM in ddim_steps, or else by all the ancestral steps."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **kwargs)
        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)
