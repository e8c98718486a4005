"""Layers of the autoencoder a band of rows at a time, so that only what lies between layers is ever whole.

A picture that is decoded in tiles shows their seams: each tile has normalisations and an attention of its own. Here
each layer by itself goes through the picture in bands. The means and variances are those of the whole picture, and a
band comes with the rows around it that its convolutions see: the result is that of the whole, up to rounding.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

REACH = 2  # rows; even, so that halving stays aligned

_most = 2**26


def set_band(entries: int) -> int:
    """Let no band of the process's inference have more entries than this of what comes in; gives back the number
    before. 2^26, the default, takes 256 MiB in float32, and leaves a picture of 512x512 pixels whole."""
    global _most
    if entries < 1:
        raise ValueError(f"a band must have room for 1 entry at least, got {entries}")
    previous, _most = _most, entries
    return previous


def band_rows(x: Tensor, least: int = 2) -> int:
    """How many rows of x (b, c, h, w) a band has: an even number, so that it can be halved."""
    return max(least, _most * x.shape[2] // x.numel() // 2 * 2)


def in_bands(run: Callable[..., Tensor], *inputs: Tensor, zoom: float = 1.0) -> Tensor:
    """run(*inputs), computed in bands where the inputs (b, c, h, w), all of one height, are large and no gradient is
    asked for. `run` may look at REACH rows above and below a row; zoom: how much higher its output is, 0.5, 1 or 2.
    """
    height = inputs[0].shape[2]
    rows = min(band_rows(x, 2 * REACH) for x in inputs)
    if rows >= height or torch.is_grad_enabled():
        return run(*inputs)
    whole = None
    for top in range(0, height, rows):
        end = min(top + rows, height)
        first, last = max(top - REACH, 0), min(end + REACH, height)
        band = run(*(x[:, :, first:last] for x in inputs))
        if whole is None:
            flat = band.is_contiguous(memory_format=torch.channels_last)
            whole = torch.empty(
                (*band.shape[:2], int(height * zoom), band.shape[3]), dtype=band.dtype, device=band.device,
                memory_format=torch.channels_last if flat else torch.contiguous_format,
            )  # fmt: skip
        start, stop, cut = (int(row * zoom) for row in (top, end, top - first))
        whole[:, :, start:stop] = band[:, :, cut:cut + stop - start]
    return whole


class NormOf:
    """The group normalisation of x (b, c, h, w) as a function of bands of it, by the means and variances of all x."""

    def __init__(self, norm: nn.GroupNorm, x: Tensor):
        self.norm, self.x = norm, x

    def __call__(self, band: Tensor) -> Tensor:
        if band.shape[2] == self.x.shape[2]:
            return self.norm(band)
        factor, summand = self._affine
        return torch.addcmul(summand, band.float(), factor).to(band.dtype)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """The factor and the summand (b, c, 1, 1), in float32, that normalising comes to.

        From the variances within bands and that of their means, which lose no digits as a sum of squares does.
        """
        norm, height = self.norm, self.x.shape[2]
        bands = self.x.split(band_rows(self.x), dim=2)
        parts = [
            torch.var_mean(band.unflatten(1, (norm.num_groups, -1)).float(), dim=(2, 3, 4), correction=0)
            for band in bands
        ]
        within, means = (torch.stack(values) for values in zip(*parts))  # (bands, b, groups)
        share = within.new_tensor([band.shape[2] / height for band in bands])[:, None, None]
        mean = (share * means).sum(0)
        spread = ((share * (within + (means - mean).square())).sum(0) + norm.eps).rsqrt()
        mean, spread = (each.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for each in (mean, spread))
        factor = spread * norm.weight.float()
        summand = norm.bias.float() - mean * factor
        return factor[:, :, None, None], summand[:, :, None, None]
