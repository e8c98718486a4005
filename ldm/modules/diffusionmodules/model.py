"""Encoder and decoder of the autoencoders (Esser et al. 2021): residual blocks, one attention layer in the middle.

`nonlinearity` is looked up in this module at each call, because public code rebinds it here. Large pictures go through
the layers in bands of rows (`ldm.modules.bands`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention
from ldm.modules.attention_ops import attention
from ldm.modules.bands import NormOf, in_bands
from ldm.modules.diffusionmodules.util import regroup


def nonlinearity(x: Tensor) -> Tensor:
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class Upsample(nn.Module):
    """Double both sides of (b, c, h, w) by repeating pixels, then convolve if asked."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return in_bands(self._double, x, zoom=2.0)

    def _double(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve both sides of (b, c, h, w); the convolution pads only the right and the bottom edge."""

    def __init__(self, in_channels: int, with_conv: bool):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return in_bands(self._halve, x, zoom=0.5)

    def _halve(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Two convolutions added to their input: (b, in_channels, h, w) -> (b, out_channels, h, w).

    temb, (b, temb_channels), shifts what lies between them; 0 channels stand for none.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        norm = NormOf(self.norm1, x)
        h = in_bands(lambda x: self.conv1(nonlinearity(norm(x))), x)
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        return in_bands(partial(self._second_half, NormOf(self.norm2, h)), x, h)

    def _second_half(self, norm: Callable[[Tensor], Tensor], x: Tensor, h: Tensor) -> Tensor:
        h = self.conv2(self.dropout(nonlinearity(norm(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """One head of self-attention over all pixels, added to its input: (b, in_channels, h, w)."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            t.flatten(2).transpose(1, 2).contiguous()[:, None]  # (b, 1, h * w, c); no copy in channels_last
            for t in (self.q(h), self.k(h), self.v(h))
        )
        h = attention(q, k, v, self.in_channels**-0.5)
        return x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class LinAttnBlock(LinearAttention):
    """Linear attention with a single head as wide as the feature map."""

    def __init__(self, in_channels: int):
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


# The name under which public code asks for attention that stores no score matrix: ours never does.
MemoryEfficientAttnBlock = AttnBlock


def make_attn(in_channels: int, attn_type: str = "vanilla", attn_kwargs: dict | None = None) -> nn.Module:
    """The attention layer of this name; `attn_kwargs` is accepted for layers that take options, which none here do."""
    match attn_type:
        case "vanilla":
            return AttnBlock(in_channels)
        case "vanilla-xformers":
            return MemoryEfficientAttnBlock(in_channels)
        case "linear":
            return LinAttnBlock(in_channels)
        case "none":
            return nn.Identity()
    raise ValueError(f"attn_type must be vanilla, vanilla-xformers, linear or none, got {attn_type!r}")


def _middle(channels: int, dropout: float, attn_type: str) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(in_channels=channels, temb_channels=0, dropout=dropout)
    mid.attn_1 = make_attn(channels, attn_type)
    mid.block_2 = ResnetBlock(in_channels=channels, temb_channels=0, dropout=dropout)
    return mid


def _level(channels: int, out: int, blocks: int, dropout: float, attn_type: str | None) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_channels=out if i else channels, out_channels=out, temb_channels=0, dropout=dropout)
        for i in range(blocks)
    )
    level.attn = nn.ModuleList(make_attn(out, attn_type) for _ in range(blocks) if attn_type)
    return level


class Encoder(nn.Module):
    """Picture (b, in_channels, h, w) -> features (b, 2 * z_channels if double_z, h / f, w / f), f = 2^(levels - 1).

    attn_resolutions are sides at which each block is followed by attention, counted from `resolution`. norm_channels:
    how many channels are normalised together, instead of a 32nd of all.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        norm_channels: int | None = None,
        **ignored,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        widths = [ch * mult for mult in ch_mult]
        self.ch = ch
        self.num_resolutions = len(widths)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels

        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([ch, *widths], widths)):
            attends = resolution // 2**i in attn_resolutions
            level = _level(before, width, num_res_blocks, dropout, attn_type if attends else None)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = _middle(widths[-1], dropout, attn_type)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)
        regroup(self, norm_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                h = block(h)
                if level.attn:
                    h = level.attn[j](h)
            if i < self.num_resolutions - 1:
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        norm = NormOf(self.norm_out, h)
        return in_bands(lambda h: self.conv_out(nonlinearity(norm(h))), h)


class Decoder(nn.Module):
    """Latent (b, z_channels, h, w) -> picture (b, out_ch, f * h, f * w), f = 2^(levels - 1).

    The options are the encoder's, and two more: give_pre_end stops before the last normalisation, tanh_out squashes the
    pixels into [-1, 1].
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        norm_channels: int | None = None,
        **ignored,
    ):
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        widths = [ch * mult for mult in ch_mult]
        self.ch = ch
        self.num_resolutions = len(widths)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out

        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], dropout, attn_type)
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            attends = resolution // 2**i in attn_resolutions
            level = _level(before, width, num_res_blocks + 1, dropout, attn_type if attends else None)
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = Normalize(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)
        regroup(self, norm_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for i in reversed(range(self.num_resolutions)):
            level = self.up[i]
            for j, block in enumerate(level.block):
                h = block(h)
                if level.attn:
                    h = level.attn[j](h)
            if i > 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        norm = NormOf(self.norm_out, h)
        h = in_bands(lambda h: self.conv_out(nonlinearity(norm(h))), h)
        return torch.tanh(h) if self.tanh_out else h
