"""Encoders of pictures: one CLIP vector a picture."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.modules.encoders.clip import CLIP_MEAN, CLIP_STD
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.encoders.openclip import published_clip


class FrozenClipImageEmbedder(AbstractEncoder):
    """The picture tower of CLIP: (b, 3, h, w) in [-1, 1] -> forward (b, d), encode (b, 1, d).

    A list of texts stands for as many pictures of nothing, zeros, which such models were trained with for guidance.
    model: a key of CLIP_PACKAGE. Where a copy of its weights is on this machine it is read (see `published_clip`).
    antialias: smooth before a picture is made smaller; `jit` and `device` are there for old callers.
    """

    def __init__(
        self, model: str = "ViT-L/14", jit: bool = False, device: str | None = None, antialias: bool = False
    ):
        super().__init__()
        self.model = published_clip(model, vision=True)
        # The checkpoints leave out the text blocks, which pictures do not pass.
        del self.model.transformer
        self.antialias = antialias
        self.model.eval().requires_grad_(False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize (bicubic, corner to corner) and normalise: (b, 3, h, w) in [-1, 1] -> (b, 3, side, side), float32."""
        side = self.model.visual.image
        corners = None if self.antialias else True  # torch smooths no other way
        x = interpolate(x.float(), (side, side), mode="bicubic", align_corners=corners, antialias=self.antialias)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return ((x + 1) / 2 - mean) / std

    def forward(self, x: Tensor | Sequence[str]) -> Tensor:
        proj = self.model.visual.proj
        if not torch.is_tensor(x):
            return torch.zeros(len(x), proj.shape[1], device=self.device, dtype=proj.dtype)
        return self.model.encode_image(self.preprocess(x.to(self.device)).to(proj.dtype))

    def encode(self, x: Tensor | Sequence[str]) -> Tensor:
        return self(x)[:, None]


FrozenCLIPImageEmbedder = FrozenClipImageEmbedder
