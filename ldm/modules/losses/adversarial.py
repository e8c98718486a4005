"""What the losses of both autoencoders share: a perceptual distance and a discriminator of adaptive weight."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.losses.discriminator import D_LOSSES, NLayerDiscriminator, adopt_weight
from ldm.modules.losses.lpips import LPIPS


class AdversarialLoss(nn.Module):
    """Reconstruction, perceptual and adversarial terms (Esser et al. 2021, section 3.1).

    disc_start: the step from which the discriminator counts. perceptual_weight 0 needs no VGG16; its weights are read
    from `perceptual_files`, see `LPIPS`. disc_conditional lets the discriminator see the condition too. disc_factor 0
    does without a discriminator: it is then None.
    """

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int,
        disc_in_channels: int,
        disc_factor: float,
        disc_weight: float,
        perceptual_weight: float,
        use_actnorm: bool,
        disc_conditional: bool,
        disc_loss: str,
        disc_ndf: int = 64,
        perceptual_files: str | Sequence[str] = (),
    ):
        super().__init__()
        if disc_loss not in D_LOSSES:
            raise ValueError(f"disc_loss must be one of {', '.join(D_LOSSES)}, got {disc_loss!r}")
        if use_actnorm:
            raise ValueError("use_actnorm is not supported: the discriminator normalises by batch")
        self.perceptual_weight = perceptual_weight
        if perceptual_weight > 0:
            self.perceptual_loss = LPIPS(perceptual_files)
        self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers) if disc_factor else None
        self.discriminator_iter_start = disc_start
        self.disc_loss = D_LOSSES[disc_loss]
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def perceptual(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """The perceptual distance (b, 1, 1, 1), a single 0 without one."""
        if self.perceptual_weight > 0:
            return self.perceptual_loss(inputs, reconstructions)
        return inputs.new_zeros(1)

    def logits(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """The discriminator's opinion of pictures, seen beside their condition if it is conditional."""
        if (cond is not None) != self.disc_conditional:
            raise ValueError("cond must be given if and only if disc_conditional is set")
        return self.discriminator(images if cond is None else torch.cat([images, cond], dim=1))

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
        """disc_weight times the ratio of the two gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
        nll_grad, g_grad = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll_loss, g_loss))
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def generator_term(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What fooling the discriminator adds to the autoencoder's loss, and its parts by name."""
        if self.discriminator is None:
            return reconstructions.new_zeros(()), {}
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        g_loss = -self.logits(reconstructions, cond).mean()
        if factor > 0 and nll_loss.requires_grad:
            weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        else:
            weight = g_loss.new_zeros(())
        parts = {"d_weight": weight, "disc_factor": torch.tensor(float(factor)), "g_loss": g_loss.detach()}
        return weight * factor * g_loss, parts

    def discriminator_term(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's own loss, and its parts by name."""
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        real = self.logits(inputs.detach(), cond)
        fake = self.logits(reconstructions.detach(), cond)
        loss = factor * self.disc_loss(real, fake)
        parts = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, named(parts, split)


def named(parts: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Parts of a loss as they are logged: averaged, under the name of the split."""
    return {f"{split}/{name}": value.detach().mean() for name, value in parts.items()}
