"""What Stability AI's configs say of a network: what it puts out, and the noise levels that it was trained on."""

from collections.abc import Mapping

import torch
from torch import nn

from ldm.modules.diffusionmodules.util import schedule_buffers
from ldm.sampling.schedule import make_beta_schedule
from ldm.util import instantiate_from_config


class EpsScaling:
    """The network predicts the noise."""

    parameterization = "eps"


class VScaling:
    """The network predicts the velocity (Salimans & Ho 2022, app. D)."""

    parameterization = "v"


class EpsWeighting(EpsScaling):
    """How training weighs the noise levels; nothing here is weighed."""


class VWeighting(VScaling):
    """As EpsWeighting."""


class LegacyDDPMDiscretization:
    """The levels of Stable Diffusion: betas (num_timesteps,) linear in their roots."""

    def __init__(self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: int = 1000):
        self.betas = make_beta_schedule("linear", num_timesteps, linear_start, linear_end)


class DiscreteDenoiser(nn.Module):
    """The trained levels and what the network says at them.

    Its one buffer, `sigmas` (num_idx,) = sqrt(1 - alphas_cumprod) / sqrt(alphas_cumprod) from the quietest to the
    noisiest, is what checkpoints carry of the schedule. The other parameters are those of the original's own samplers.
    """

    def __init__(
        self,
        scaling_config: Mapping,
        num_idx: int,
        discretization_config: Mapping,
        weighting_config: Mapping | None = None,
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
    ):
        super().__init__()
        self.parameterization = instantiate_from_config(scaling_config).parameterization
        self.betas = instantiate_from_config(discretization_config).betas
        if len(self.betas) != num_idx:
            raise ValueError(f"num_idx must be the {len(self.betas)} levels of the discretization, got {num_idx}")
        with torch.device("cpu"):  # real numbers even while the weights are built on meta
            sigmas = torch.tensor(schedule_buffers(self.betas)["sqrt_recipm1_alphas_cumprod"], dtype=torch.float32)
        self.register_buffer("sigmas", sigmas)
