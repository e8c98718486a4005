"""The UNet of k-diffusion's image models, as the x2 latent upscaler uses it: norms that the noise level scales."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention

GROUP = 32  # channels that are normalised together


class AdaGroupNorm(nn.Module):
    """Group normalisation of (b, channels, h, w), scaled and shifted by the embedding (b, emb_channels)."""

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.groups = max(1, channels // GROUP)
        self.linear = nn.Linear(emb_channels, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.linear(emb)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups) * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and GELU, added to the input: (b, channels, h, w)."""

    def __init__(self, channels: int, width: int, out_channels: int, emb_channels: int):
        super().__init__()
        self.norm1 = AdaGroupNorm(channels, emb_channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = AdaGroupNorm(width, emb_channels)
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.gelu(self.norm1(x, emb)))
        h = self.conv2(F.gelu(self.norm2(h, emb)))
        return self.conv_shortcut(x) + h


class BiasedAttention(CrossAttention):
    """CrossAttention whose projections have biases, and which normalises the context, if there is one."""

    def __init__(self, dim: int, context_dim: int | None, dim_head: int):
        super().__init__(dim, context_dim, dim // dim_head, dim_head)
        for name in ("to_q", "to_k", "to_v"):
            plain = getattr(self, name)
            setattr(self, name, nn.Linear(plain.in_features, plain.out_features))
        self.norm_cross = nn.Identity() if context_dim is None else nn.LayerNorm(context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, None if context is None else self.norm_cross(context), mask)


class AttentionBlock(nn.Module):
    """Attention of all places to the context, and where `looks_around` to each other first, added to the input."""

    def __init__(self, channels: int, emb_channels: int, context_dim: int, dim_head: int, looks_around: bool):
        super().__init__()
        self.looks_around = looks_around
        if looks_around:
            self.norm1 = AdaGroupNorm(channels, emb_channels)
            self.attn1 = BiasedAttention(channels, None, dim_head)
        self.norm2 = AdaGroupNorm(channels, emb_channels)
        self.attn2 = BiasedAttention(channels, context_dim, dim_head)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        def places(h: Tensor) -> Tensor:
            return h.flatten(2).transpose(1, 2).contiguous()

        def picture(h: Tensor) -> Tensor:
            return h.transpose(1, 2).unflatten(2, x.shape[2:])

        if self.looks_around:
            x = x + picture(self.attn1(places(self.norm1(x, emb))))
        return x + picture(self.attn2(places(self.norm2(x, emb)), context))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is any.

    channels: those of the input, and of each block's output.
    """

    def __init__(self, channels: Sequence[int], width: int, emb_channels: int, attention: dict | None):
        super().__init__()
        pairs = list(zip(channels, channels[1:]))  # noqa: RUF007 -- each is a list of two ends
        self.resnets = nn.ModuleList(ResidualBlock(now, width, then, emb_channels) for now, then in pairs)
        self.attentions = nn.ModuleList(
            AttentionBlock(then, emb_channels, **attention) for _, then in pairs if attention is not None
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for number, residual in enumerate(self.resnets):
            x = residual(x, emb)
            if self.attentions:
                x = self.attentions[number](x, emb, context)
        return x


def blur(x: Tensor) -> Tensor:
    """The kernel [1 3 3 1] x [1 3 3 1] / 64 for each channel of x: (c, 1, 4, 4)."""
    line = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return line.outer(line).expand(x.shape[1], 1, 4, 4)


def halve(x: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), blur(x), stride=2, groups=x.shape[1])


def double(x: Tensor) -> Tensor:
    x = F.pad(x, (1, 1, 1, 1), "reflect")
    return F.conv_transpose2d(x, 4 * blur(x), stride=2, padding=3, groups=x.shape[1])


class TimeEmbedding(nn.Module):
    """The noise level (b,) as random Fourier features, with a linear map of what else is told added: (b, width)."""

    def __init__(self, width: int, cond_channels: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(width // 2), requires_grad=False)
        self.cond = nn.Linear(cond_channels, width, bias=False)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, level: Tensor, y: Tensor) -> Tensor:
        dtype = self.frequencies.dtype
        angle = 2 * math.pi * level.float()[:, None] * self.frequencies.float()
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        h = self.linear_1(features + self.cond(y.to(dtype)))
        return F.gelu(self.linear_2(F.gelu(h)))


class KUNetModel(nn.Module):
    """A network of k-diffusion: (b, in_channels, h, w) -> (b, out_channels, h, w).

    All but the first level attend to the context (b, m, context_dim), the coarsest also to itself; cond_channels: the
    width of y. The first block on the way down only leads to the next level, and each level on the way up begins with
    what the same one on the way down ended with.
    """

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 5,
        model_channels: int = 384,
        channel_mult: Sequence[int] = (1, 1, 2, 2),
        num_res_blocks: int = 4,
        num_head_channels: int = 64,
        context_dim: int = 768,
        cond_channels: int = 896,
        image_size: int | None = None,
    ):
        super().__init__()
        widths = [model_channels * factor for factor in channel_mult]
        emb = 2 * widths[0]
        coarsest = len(widths) - 1
        self.image_size = image_size
        self.in_channels, self.out_channels, self.cond_channels = in_channels, out_channels, cond_channels
        self.time_embed = TimeEmbedding(emb, cond_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 1)
        self.input_blocks, self.output_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            attention = {"context_dim": context_dim, "dim_head": num_head_channels, "looks_around": level == coarsest}
            attention = attention if level else None
            before = widths[max(0, level - 1)]
            inner = [width] * (num_res_blocks - 1)
            self.input_blocks.append(Level([before, *inner, width], width, emb, attention))
            first = width if level == coarsest else 2 * width
            self.output_blocks.insert(0, Level([first, *inner, before], width, emb, attention))
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """timesteps: c_noise of Karras et al. 2022, table 1, (b,); the answer has the dtype of x."""
        emb, context = self.time_embed(timesteps, y), context.to(self.dtype)
        h = self.conv_in(x.to(self.dtype))
        skips = []
        for level, block in enumerate(self.input_blocks):
            h = block(halve(h) if level else h, emb, context)
            skips.append(h)
        skips.pop()
        for level, block in enumerate(self.output_blocks):
            h = block(torch.cat([double(h), skips.pop()], dim=1) if level else h, emb, context)
        return self.conv_out(h).to(x.dtype)
