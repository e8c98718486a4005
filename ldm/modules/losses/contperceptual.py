"""The loss of the autoencoder with a Gaussian latent (Rombach et al. 2022, appendix G)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, named


class DummyLoss(nn.Identity):
    """Stands where a config must name a loss that is never taken."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Laplace likelihood of learned variance, KL term and adversarial term: called once for each of two optimizers."""

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_files: str | Sequence[str] = (),
    ):
        super().__init__(
            disc_start,
            disc_num_layers,
            disc_in_channels,
            disc_factor,
            disc_weight,
            perceptual_weight,
            use_actnorm,
            disc_conditional,
            disc_loss,
            perceptual_files=perceptual_files,
        )
        self.kl_weight = kl_weight
        self.pixel_weight = pixelloss_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and its parts by name.

        inputs, reconstructions: (b, c, h, w) in [-1, 1]. weights: what each pixel counts.
        """
        if optimizer_idx == 1:
            return self.discriminator_term(inputs, reconstructions, global_step, cond, split)
        batch = len(inputs)
        rec_loss = (inputs - reconstructions).abs()
        rec_loss = rec_loss + self.perceptual_weight * self.perceptual(inputs, reconstructions)
        nll = rec_loss / self.logvar.exp() + self.logvar
        nll_loss = nll.sum() / batch
        weighted = nll_loss if weights is None else (weights * nll).sum() / batch
        kl_loss = posteriors.kl().sum() / batch
        adversarial, parts = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = weighted + self.kl_weight * kl_loss + adversarial
        parts |= {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss,
        }
        return loss, named(parts, split)
