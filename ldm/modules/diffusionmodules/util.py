"""Small parts that the networks share, and the schedule functions that public code imports from here."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ldm.sampling.schedule import make_beta_schedule, make_ddim_sampling_parameters, make_ddim_timesteps

__all__ = [
    "GroupNorm32",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "noise_like",
    "normalization",
    "regroup",
    "schedule_buffers",
    "timestep_embedding",
    "zero_module",
]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A 1, 2 or 3-dimensional convolution."""
    return _CONV[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A 1, 2 or 3-dimensional average pooling."""
    return _AVG_POOL[dims](*args, **kwargs)


def linear(*args, **kwargs) -> nn.Linear:
    return nn.Linear(*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation of any dtype; torch takes its means and variances in float32."""


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation of `channels` in 32 groups, eps 1e-5."""
    return GroupNorm32(32, channels)


def regroup(module: nn.Module, channels: int | None) -> None:
    """Let every group normalisation in a module take `channels` channels together; None leaves the groups as they are.

    Small groups lose the level of flat pictures, which narrow networks in 32 groups are slow to learn again.
    """
    for norm in module.modules() if channels else ():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = norm.num_channels // channels


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpoint(func: Callable, inputs: Sequence, params: Sequence, flag: bool):
    """func(*inputs); where `flag` is set and gradients are on, its activations are recomputed in the backward pass.

    `params` is what the reentrant form once needed; autograd finds the parameters by itself.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Cosines, then sines, of each timestep at dim / 2 frequencies (Vaswani et al. 2017, section 3.5).

    timesteps: (b,), whole or not. Returns float32 (b, dim); an odd `dim` ends in a zero; `repeat_only`
    repeats the timestep.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim)
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, 1)) if dim % 2 else embedding


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """The entries a[t], (b,), shaped (b, 1, ...) to broadcast over a tensor of shape `x_shape`."""
    return a[t].reshape(len(t), *(1,) * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Gaussian noise of `shape`; with `repeat`, the same for every entry of the batch."""
    if not repeat:
        return torch.randn(shape, device=device)
    return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *(1,) * (len(shape) - 1))


def schedule_buffers(betas: np.ndarray) -> dict[str, np.ndarray]:
    """What checkpoints keep of a noise schedule besides its posterior, by name, each (timesteps,)."""
    kept = np.cumprod(1.0 - betas)
    with np.errstate(divide="ignore"):
        return {
            "betas": betas,
            "alphas_cumprod": kept,
            "alphas_cumprod_prev": np.append(1.0, kept[:-1]),
            "sqrt_alphas_cumprod": np.sqrt(kept),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - kept),
            "log_one_minus_alphas_cumprod": np.log(1.0 - kept),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / kept),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / kept - 1.0),
        }
