"""What becomes of the small picture that an upscaler is conditioned on (Saharia et al. 2021; Ho et al. 2022)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import extract_into_tensor, schedule_buffers
from ldm.sampling.schedule import make_beta_schedule


class AbstractLowScaleModel(nn.Module):
    """A picture as it is, on the noise schedule that `noise_schedule_config` describes, if any.

    The schedule's buffers keep float32 when the module is cast.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None):
        super().__init__()
        self.schedule: tuple[str, ...] = ()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the betas and what follows from them, (timesteps,) each."""
        buffers = schedule_buffers(make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s))
        self.num_timesteps = timesteps
        self.schedule = tuple(buffers)
        with torch.device("cpu"):
            for name, values in buffers.items():
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def _apply(self, fn, recurse: bool = True):
        exact = {name: self._buffers[name] for name in self.schedule}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            self._buffers[name] = values.to(self._buffers[name].device)
        return self

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_start (b, c, h, w) at the noise levels t (b,) (Ho et al. 2020, eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return alpha * x_start + sigma * noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to condition on, and its noise level (b,) if it has one."""
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """The picture itself, at noise level 0."""

    def __init__(self):
        super().__init__()
        self.max_noise_level = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x), dtype=torch.long, device=x.device)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """The picture with noise of a level up to `max_noise_level`, so that the upscaler does not trust its every flaw."""

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
    ):
        super().__init__(noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The noised picture and the levels (b,) int64; levels and noise are drawn where none are given."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
        return self.q_sample(x, noise_level, noise), noise_level
