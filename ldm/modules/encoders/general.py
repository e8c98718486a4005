"""Encoders of classes and of pictures that are conditions as they are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.errors import ConfigError


class AbstractEncoder(nn.Module):
    """Anything that `cond_stage_config` may name: `encode` turns what the data holds into a condition."""

    def encode(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the weights are, unless public code has set another place."""
        chosen = self.__dict__.get("chosen_device")
        return chosen or next((p.device for p in self.parameters()), torch.device("cpu"))

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.__dict__["chosen_device"] = torch.device(device)


class IdentityEncoder(AbstractEncoder):
    """The condition is what the data holds."""

    def encode(self, x):
        return x

    def forward(self, x):
        return x


class ClassEmbedder(AbstractEncoder):
    """A learned vector a class: {key: labels (b,)} -> (b, 1, embed_dim); class n_classes - 1 stands for none.

    ucg_rate: in training, the share of labels that become that last class, for classifier-free guidance. It is 0 unless
    asked for, because a table without a spare class would lose its last one.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0):
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False) -> Tensor:
        labels = batch[key or self.key][:, None].to(self.device)
        if self.training and self.ucg_rate > 0 and not disable_dropout:
            drop = torch.rand(labels.shape, device=labels.device) < self.ucg_rate
            labels = labels.masked_fill(drop, self.n_classes - 1)
        return self.embedding(labels.long())

    def encode(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        return self(batch, key)

    def get_unconditional_conditioning(self, bs: int, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """The batch of `bs` labels that stand for no class."""
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device or self.device)}


class SpatialRescaler(AbstractEncoder):
    """Scale a picture by `multiplier` n_stages times, then map its channels: (b, c, h, w) -> (b, out, h', w')."""

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if n_stages < 0 or method not in self.METHODS:
            raise ConfigError(
                f"SpatialRescaler needs n_stages >= 0 and a method of {', '.join(self.METHODS)}; "
                f"got {n_stages} and {method!r}"
            )
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.remap_output = out_channels is not None
        if self.remap_output:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x.to(self.channel_mapper.weight.dtype)) if self.remap_output else x

    def encode(self, x: Tensor) -> Tensor:
        return self(x)
