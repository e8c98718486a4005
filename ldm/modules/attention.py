"""Transformer blocks that let a feature map look at itself and at a context (Rombach et al. 2022, section 3.3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention_ops import attention
from ldm.modules.diffusionmodules.util import checkpoint, zero_module
from ldm.util import default, exists

__all__ = [
    "GEGLU",
    "BasicTransformerBlock",
    "CrossAttention",
    "FeedForward",
    "LinearAttention",
    "MemoryEfficientCrossAttention",
    "Normalize",
    "SpatialTransformer",
    "default",
    "exists",
]


def Normalize(in_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, in_channels, eps=1e-6)


class GEGLU(nn.Module):
    """A linear map gated by the GELU of another (Shazeer 2020): (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear maps with a hidden layer `mult` times as wide: (..., dim) -> (..., dim_out or dim)."""

    def __init__(self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0):
        super().__init__()
        inner = int(dim * mult)
        widen = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LinearAttention(nn.Module):
    """Attention at a cost linear in the number of pixels (Shen et al. 2021): (b, dim, h, w) in and out."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = self.to_qkv(x).reshape(b, 3, self.heads, -1, h * w).unbind(1)  # (b, heads, d, n) each
        summary = v @ k.softmax(dim=-1).transpose(-1, -2)  # (b, heads, d, d)
        return self.to_out((summary @ q).reshape(b, -1, h, w))


class CrossAttention(nn.Module):
    """Multi-head attention from x (b, n, query_dim) to context (b, m, context_dim), or to x itself without one."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        inner, context_dim = heads * dim_head, default(context_dim, query_dim)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Returns (b, n, query_dim). mask: booleans (b, m), True where a context position may be seen."""
        context = x if context is None else context
        q, k, v = (
            t.view(*t.shape[:2], self.heads, -1).transpose(1, 2)  # (b, heads, n, d)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = mask.flatten(1)[:, None, None, :]
        out = attention(q, k, v, self.scale, mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


# The name under which public code asks for attention that stores no score matrix: ours never does.
MemoryEfficientCrossAttention = CrossAttention


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each normalised before and added after: (b, n, dim)."""

    ATTENTION_MODES = {"softmax": CrossAttention, "softmax-xformers": MemoryEfficientCrossAttention}  # noqa: RUF012

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ):
        super().__init__()
        attend = self.ATTENTION_MODES["softmax"]
        heads = {"heads": n_heads, "dim_head": d_head, "dropout": dropout}
        self.disable_self_attn = disable_self_attn
        self.attn1 = attend(dim, context_dim if disable_self_attn else None, **heads)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = attend(dim, context_dim, **heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return checkpoint(self._forward, (x, context), (), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it: (b, in_channels, h, w) in and out.

    context_dim: one width, or one for each of the `depth` blocks. use_linear projects the pixels with a matrix instead
    of a 1x1 convolution: the same arithmetic with weights of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ):
        super().__init__()
        inner = n_heads * d_head
        single = context_dim is None or isinstance(context_dim, int)
        widths = [context_dim] if single else list(context_dim)
        widths = widths * depth if len(widths) == 1 else widths
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=widths[i],
                disable_self_attn=disable_self_attn,
                checkpoint=use_checkpoint,
            )
            for i in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """context: (b, m, context_dim), or one for each block."""
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (b, h * w, c); no copy in channels_last
        if self.use_linear:
            h = self.proj_in(h)
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, context=context[i] if isinstance(context, list | tuple) else context)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, h, w), in channels_last
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h
