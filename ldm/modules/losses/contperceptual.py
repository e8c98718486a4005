"""The loss of the autoencoder with a Gaussian latent (Rombach et al. 2022, appendix G)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, named

THUMBNAIL_SCALE = 2.0  # pictures in [-1, 1] vary by about a half, latents should by one
SAME, OTHER = 0.1, 0.5  # colours in [-1, 1] nearer than that are of the ground, farther ones are not


class DummyLoss(nn.Identity):
    """Stands where a config must name a loss that is never taken."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Laplace likelihood of learned variance, KL term and adversarial term: called once for each of two optimizers.

    thumbnail_weight: what it costs if the first three latent channels are not the picture made small, times 2. A latent
    that is as plain as that is easier to diffuse (Skorokhodov et al. 2025, "Improving the Diffusability of
    Autoencoders", ask the decoder for it, with a latent made small); the other channels hold what sharpens it.
    silhouette_weight: what it costs if the channel after those is not the `silhouette` made small, times 2. What is of
    which shape then stands in one channel, whatever the colours.
    """

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
        thumbnail_weight: float = 0.0,
        silhouette_weight: float = 0.0,
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
        self.thumbnail_weight = thumbnail_weight
        self.silhouette_weight = silhouette_weight
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
        if self.thumbnail_weight:
            parts["thumbnail_loss"] = thumbnail_loss(inputs, posteriors.mean).sum() / batch
            loss = loss + self.thumbnail_weight * parts["thumbnail_loss"]
        if self.silhouette_weight:
            channel = posteriors.mean[:, inputs.shape[1]:inputs.shape[1] + 1]
            parts["silhouette_loss"] = thumbnail_loss(silhouette(inputs), channel).sum() / batch
            loss = loss + self.silhouette_weight * parts["silhouette_loss"]
        parts |= {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss,
        }
        return loss, named(parts, split)


def thumbnail_loss(inputs: Tensor, latents: Tensor) -> Tensor:
    """The squared distance of the first channels of latents (b, z, h, w) from inputs (b, c, H, W) made small."""
    small = THUMBNAIL_SCALE * F.adaptive_avg_pool2d(inputs, latents.shape[2:])
    return (latents[:, :inputs.shape[1]] - small).square()


def silhouette(pictures: Tensor) -> Tensor:
    """What stands out from the ground of pictures (b, c, h, w) in [-1, 1]: (b, 1, h, w), 1 there and -1 elsewhere.

    The ground is the mean colour along the picture's edge, so this is for pictures of things on a plain ground.
    """
    edges = (pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1])
    ground = torch.cat(edges, dim=-1).mean(dim=-1)[..., None, None]
    distance = (pictures - ground).norm(dim=1, keepdim=True)
    return 2 * ((distance - SAME) / (OTHER - SAME)).clamp(0, 1) - 1
