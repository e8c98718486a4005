"""Latent diffusion on latents that were encoded beforehand, and the exact score of the shapes world while it trains."""

from collections.abc import Mapping
from random import Random

import numpy as np
import pytorch_lightning as pl  # before the models: their base class is then Lightning's
import torch
from torch import Tensor

from ldm.data.shapes import sample_caption
from ldm.evaluation.shapes import score
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class CachedLatentDiffusion(LatentDiffusion):
    """LatentDiffusion whose batches hold moments (b, h, w, 2c), as `ldm.data.latents` keeps them, in place of pictures.

    The weights, their names and the mathematics are those of LatentDiffusion, under whose name the result is run.

    windows: {"side", "each", "timestep_density"} adds the loss of so many windows of each picture, cut where it
    changes, at timesteps of a density of their own: what is drawn there is then learnt from fewer positions (Wang et
    al. 2023, "Patch Diffusion").
    sample_posterior: whether latents are drawn from the posterior, as usual, or are its mean, whose outlines are finer
    than the noise of a draw lets the last steps learn.
    """

    def __init__(self, *args, windows: Mapping | None = None, sample_posterior: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows = windows
        self.sample_posterior = sample_posterior

    def shared_step(self, batch: Mapping, **kwargs) -> tuple[Tensor, dict]:
        """The loss of a batch, with its own `noise` (b, h, w, c) where it holds one."""
        if "noise" in batch:
            kwargs["noise"] = batch["noise"].movedim(-1, 1)
        return super().shared_step(batch, **kwargs)

    def forward(self, x: Tensor, c: Tensor, *args, **kwargs) -> tuple[Tensor, dict]:
        """The loss of latents x (b, c, h, w), in training with that of their windows, and its parts by name."""
        loss, parts = super().forward(x, c, *args, **kwargs)
        if self.windows and self.training:
            each = self.windows["each"]
            t = self.timesteps_around(len(x) * each, **self.windows["timestep_density"])
            near, _ = self.diffusion_loss(cut(x, each, self.windows["side"]), c.repeat_interleave(each, dim=0), t, None)
            loss, parts = loss + near, parts | {"train/loss_windows": near}
        return loss, parts

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """The posterior whose moments these are."""
        return DiagonalGaussianDistribution(x, deterministic=not self.sample_posterior)

    def log_images(self, batch: Mapping, **options) -> dict[str, Tensor]:
        """What LatentDiffusion shows but for the inputs, which are no pictures here."""
        return {name: image for name, image in super().log_images(batch, **options).items() if name != "inputs"}


def cut(x: Tensor, each: int, side: int) -> Tensor:
    """`each` squares of each of x (b, c, h, w), (b * each, c, side, side), of places drawn by how much x changes there.

    A place lies anywhere in its square, which never leaves x and is at most as long as its shorter side.
    """
    side = min(side, *x.shape[-2:])
    across, down = (x.diff(dim=dim, append=x.narrow(dim, -1, 1)) for dim in (-1, -2))
    change = (across.square() + down.square()).sum(dim=1)
    places = change.flatten(1).clamp(min=1e-6).multinomial(each, replacement=True).flatten()
    shift = torch.randint(side, (2, len(places)), device=x.device)
    top = (places // x.shape[-1] - shift[0]).clamp(0, x.shape[-2] - side).tolist()
    left = (places % x.shape[-1] - shift[1]).clamp(0, x.shape[-1] - side).tolist()
    return torch.stack([x[i // each, :, a:a + side, b:b + side] for i, (a, b) in enumerate(zip(top, left))])


class ExactScore(pl.Callback):
    """After each validation draw `n` captions and log, as val/exact, the share whose every attribute is right.

    Half of the captions name two objects, and all are new to the model only by chance. Drawn with DDIM at a guidance
    scale, from noise that depends on the seed alone; also logged are the parts of the score, val/exact_<attribute>.
    """

    def __init__(self, n: int = 32, batch_size: int = 16, steps: int = 20, scale: float = 7.5, seed: int = 0):
        self.captions = [str(sample_caption(Random(f"{seed}/{i}"), split="all")) for i in range(n)]
        self.batch_size, self.steps, self.scale, self.seed = batch_size, steps, scale, seed

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: LatentDiffusion) -> None:
        if trainer.sanity_checking:
            return
        with pl_module.ema_scope(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            scores = [found for start in range(0, len(self.captions), self.batch_size)
                      for found in self.draw(pl_module, self.captions[start:start + self.batch_size])]
        for name in ("background", "count", "colour", "shape", "size", "relation"):
            pl_module.log(f"val/exact_{name}", float(np.mean([getattr(found, name) for found in scores])))
        pl_module.log("val/exact", float(np.mean([found.right for found in scores])), prog_bar=True)

    def draw(self, model: LatentDiffusion, captions: list[str]) -> list:
        """The scores of one picture for each caption."""
        return list(map(score, pictures(model, captions, self.scale, self.steps), captions))


@torch.no_grad()
def pictures(
    model: LatentDiffusion, captions: list[str], scale: float, steps: int, noise: Tensor | None = None
) -> np.ndarray:
    """What a model draws of captions by DDIM at a guidance scale, from noise (b, c, h, w): uint8 (b, h, w, 3)."""
    guidance = {
        "unconditional_guidance_scale": scale,
        "unconditional_conditioning": model.get_learned_conditioning([""] * len(captions)),
    }
    cond = model.get_learned_conditioning(captions)
    latents, _ = model.sample_log(cond, len(captions), True, steps, eta=0.0, x_T=noise, **guidance)
    pixels = (model.decode_first_stage(latents).float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().movedim(1, -1).cpu().numpy()
