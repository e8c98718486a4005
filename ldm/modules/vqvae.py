"""Vector quantisation (van den Oord et al. 2017): each latent pixel becomes the nearest of n_e learned vectors."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class VectorQuantizer(nn.Module):
    """A codebook of `n_e` vectors of width `e_dim`, embedding.weight: (n_e, e_dim).

    beta: weight of the commitment term; `legacy` puts it on the codebook term instead, as the published models were
    trained. remap: an .npy file of the ids in use, which are then numbered from 0; ids that are not in use become
    unknown_index: a number, `random` or `extra`. sane_index_shape gives ids as (b, h, w) instead of flat.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap = remap
        self.unknown_index = unknown_index
        self.re_embed = n_e
        if remap is not None:
            with torch.device("cpu"):
                self.register_buffer("used", torch.from_numpy(np.load(remap)).long())
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
            logger.info("%d codes of %d are in use; others become %s", len(self.used), n_e, self.unknown_index)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(b, e_dim, h, w) -> the quantised latent, the loss of codebook and commitment, (None, None, ids).

        The gradient passes straight through to z. The other arguments belong to quantisers that sample, which this one
        does not. Distances are taken in float32: in half precision the nearest code would often be another.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("the nearest code is taken without a temperature or logits")
        codes = self.embedding.weight.float()
        pixels = z.movedim(1, -1)  # (b, h, w, e_dim)
        # |z - e|^2 less |z|^2, which is the same for all codes
        distances = codes.square().sum(dim=1) - 2 * pixels.flatten(0, -2).float() @ codes.T
        ids = distances.argmin(dim=1).view(pixels.shape[:-1])
        quantised = F.embedding(ids, codes).movedim(-1, 1).to(z.dtype)

        commitment = (quantised.detach() - z).square().mean()
        codebook = (quantised - z.detach()).square().mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        quantised = z + (quantised - z).detach()
        if self.remap is not None:
            ids = self.remap_to_used(ids)
        return quantised, loss, (None, None, ids if self.sane_index_shape else ids.flatten())

    def remap_to_used(self, ids: Tensor) -> Tensor:
        """The place of each id among those in use."""
        match = ids[..., None] == self.used
        known, places = match.any(dim=-1), match.int().argmax(dim=-1)
        if self.unknown_index == "random":
            return torch.where(known, places, torch.randint_like(places, self.re_embed))
        return torch.where(known, places, self.unknown_index)

    def unmap_to_all(self, places: Tensor) -> Tensor:
        """The ids at these places among those in use; the extra place stands for the first of them."""
        return self.used[torch.where(places < len(self.used), places, 0)]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """The codes of these ids: (..., e_dim), or (b, e_dim, h, w) for a shape (b, h, w, e_dim)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(tuple(shape)).movedim(-1, 1)
