"""The depth stage as YAML names it, and the size at which it looks at a picture."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import ConfigError
from ldm.modules.midas.dpt import DPTDepthModel

STEP = 32  # the coarsest features are a 32nd of the picture


def fit_depth(depth: Tensor, size: tuple[int, int], margin: float = 0.0) -> Tensor:
    """Depth (b, 1, h, w) at the size of the latents, each map stretched to [-1, 1]; a flat one is -1.

    margin: is added to the range of each, as in training.
    """
    depth = F.interpolate(depth, size, mode="bicubic", align_corners=False)
    low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
    return 2.0 * (depth - low) / (high - low + margin).clamp_min(torch.finfo(depth.dtype).tiny) - 1.0


class MiDaSInference(nn.Module):
    """Inverse depth, up to scale and shift: forward (b, 3, h, w), as `prepare` made it -> (b, 1, h, w).

    model_type: dpt_hybrid, the one that checkpoints hold; sizes: those of a DPTDepthModel, where they are others.
    """

    def __init__(self, model_type: str, **sizes: Any):
        super().__init__()
        if model_type != "dpt_hybrid":
            raise ConfigError(f"model_type must be dpt_hybrid, got {model_type!r}: no checkpoint holds another")
        self.model = DPTDepthModel(**sizes)

    def prepare(self, image: Tensor) -> Tensor:
        """A picture (b, 3, h, w) in [-1, 1] at the size that the network was trained at.

        The side that is nearer to that size is brought to it and the other one keeps up, both in steps of 32.
        """
        height, width = image.shape[-2:]
        scale = min(self.model.side / height, self.model.side / width, key=lambda scale: abs(1 - scale))
        size = [max(STEP, round(scale * side / STEP) * STEP) for side in (height, width)]
        return F.interpolate(image, size, mode="bicubic", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(next(self.parameters()).dtype)).float()
