"""The loss of the autoencoder with a codebook (Esser et al. 2021, section 3.1)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialLoss, named

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Pixel, perceptual, codebook and adversarial terms: called once for each of two optimizers.

    n_classes: the size of the codebook; given it, how much of the codebook is in use is logged too.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        perceptual_files: str | Sequence[str] = (),
    ):
        if perceptual_loss != "lpips" or pixel_loss not in PIXEL_LOSSES:
            raise ValueError(
                f"perceptual_loss must be lpips and pixel_loss l1 or l2, got {perceptual_loss!r} and {pixel_loss!r}"
            )
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
            disc_ndf=disc_ndf,
            perceptual_files=perceptual_files,
        )
        self.codebook_weight = codebook_weight
        self.pixel_weight = pixelloss_weight
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and its parts by name.

        inputs, reconstructions: (b, c, h, w) in [-1, 1]; predicted_indices: ids of the codes, any shape.
        """
        if optimizer_idx == 1:
            return self.discriminator_term(inputs, reconstructions, global_step, cond, split)
        p_loss = self.perceptual(inputs, reconstructions)
        rec_loss = self.pixel_loss(inputs, reconstructions, reduction="none") + self.perceptual_weight * p_loss
        nll_loss = rec_loss.mean()
        adversarial, parts = self.generator_term(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = nll_loss + self.codebook_weight * codebook_loss.mean() + adversarial
        parts |= {
            "total_loss": loss,
            "quant_loss": codebook_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss,
            "p_loss": p_loss,
        }
        if predicted_indices is not None and self.n_classes is not None:
            parts["perplexity"], parts["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
        return loss, named(parts, split)


def measure_perplexity(indices: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """exp(entropy) of how often each code is used, n_classes if all alike, and the number of codes used at all."""
    frequency = indices.flatten().bincount(minlength=n_classes).float()
    frequency = frequency / frequency.sum()
    perplexity = (-(frequency * (frequency + 1e-10).log()).sum()).exp()
    return perplexity, (frequency > 0).sum().float()
