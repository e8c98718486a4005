"""Muon: a matrix of weights moves by its momentum made orthogonal, as far in each direction as in every other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import AdamW

# The odd polynomial whose repetition takes every singular value in (0, 1] close to 1, and small ones fastest.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
REPEATS = 5

# Weights whose shorter side is less than this, such as those of the last layer, are left to AdamW.
NARROW = 16


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (n, m) with its singular values all near 1, by Newton-Schulz iteration (Jordan et al. 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16().contiguous()
    x = x / (x.norm() + 1e-7)
    for _ in range(REPEATS):
        square = x @ x.mT
        factor = torch.addmm(square, square, square, beta=CUBIC, alpha=QUINTIC)  # the rest of the polynomial, fused
        x = torch.addmm(x, factor, x, beta=LINEAR)
    return (x.mT if tall else x).to(matrix.dtype)


def all_orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each matrix; the processes of a run, which all hold the same ones, share the work."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [orthogonal(matrix) for matrix in matrices]
    turn, turns = dist.get_rank(), dist.get_world_size()
    found = [orthogonal(matrix).bfloat16() if number % turns == turn  # it has no more digits
             else torch.zeros_like(matrix, dtype=torch.bfloat16) for number, matrix in enumerate(matrices)]
    whole = torch.cat([matrix.flatten() for matrix in found])
    dist.all_reduce(whole)
    parts = whole.split([matrix.numel() for matrix in matrices])
    return [part.view(matrix.shape).to(matrix.dtype) for part, matrix in zip(parts, matrices)]


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight maps many numbers to many; a convolution's, (out, in, h, w), does as (out, in * h * w)."""
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) >= NARROW


class Muon(AdamW):
    """Muon for the matrices and AdamW for all other weights, of one learning rate (Jordan et al. 2024).

    rms: the root mean square of a matrix's step, in learning rates. With 0.2, that of AdamW's steps, a learning rate
    that suits AdamW suits Muon (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, rms: float = 0.2, **adamw):
        super().__init__(params, lr=lr, **adamw)
        self.momentum, self.rms = momentum, rms

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Take a step; gives what `closure`, which computes the gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None and is_matrix(weight)]
            towards = all_orthogonal([self.momentum_of(weight) for weight in weights])
            for weight, matrix in zip(weights, towards):
                length = self.rms * max(matrix.shape) ** 0.5  # its entries are 1 / sqrt(longer side)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(matrix.view_as(weight), alpha=-group["lr"] * length)
                weight.grad = None  # so that AdamW leaves it alone
        super().step()
        return loss

    def momentum_of(self, weight: Tensor) -> Tensor:
        """The momentum of Nesterov of a weight whose gradient is new, as a matrix."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["step"] = torch.tensor(0.0)  # as AdamW keeps for each weight, and looks for when a state is loaded
        state["step"] += 1
        mean = state["momentum"].mul_(self.momentum).add_(weight.grad)
        return weight.grad.add(mean, alpha=self.momentum).flatten(1)
