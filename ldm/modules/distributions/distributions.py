"""The distributions that an encoder can describe."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AbstractDistribution:
    """Something to sample from, with a most likely value."""

    def sample(self) -> Tensor:
        raise NotImplementedError

    def mode(self) -> Tensor:
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """All mass on one value."""

    def __init__(self, value: Tensor):
        self.value = value

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value


class DiagonalGaussianDistribution(AbstractDistribution):
    """Independent Gaussians for each latent pixel.

    parameters: (b, 2 * c, h, w), the means and then the log-variances, which are kept within [-30, 20]. `deterministic`
    takes all variance away.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)
        if deterministic:
            self.var = self.std = torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw (b, c, h, w); the noise is drawn on the CPU, so that it is the same on every device."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL divergence from `other`, or from the standard normal, in nats for each entry of the batch: (b,)."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=list(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL divergence between two Gaussians in nats, elementwise; plain numbers may stand for log-variances."""
    logvar1, logvar2 = (torch.as_tensor(value, dtype=mean1.dtype, device=mean1.device) for value in (logvar1, logvar2))
    spread = torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + spread)
