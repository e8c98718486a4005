"""The denoising UNet (Dhariwal & Nichol 2021) with the cross-attention of latent diffusion.

Attribute names are those of the published checkpoints. `th` and `timestep_embedding` are looked up in this module at
each call, because public code rebinds them here.
"""

from collections.abc import Sequence

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.attention_ops import attention
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    regroup,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward takes the time embedding as its second argument."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in sequence, each given what its kind needs: the time embedding, the context, or neither."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Double the sides of (b, c, h, w), then convolve; of three dimensions the first keeps its length."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the sides of (b, c, h, w) by a strided convolution or an average; of three dimensions the first is kept."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ):
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels == channels:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)
        else:
            raise ValueError(f"an average cannot turn {channels} channels into {self.out_channels}; set use_conv")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block that the time embedding shifts, or scales and shifts: (b, channels, h, w), (b, emb_channels).

    `up` or `down` resamples both branches between the first activation and the first convolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.out_channels = out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), (), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            norm, act, conv = self.in_layers
            h = conv(self.h_upd(act(norm(x))))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        shift = self.emb_layers(emb)
        shift = shift[(...,) + (None,) * (h.ndim - shift.ndim)]
        if self.use_scale_shift_norm:
            norm, *rest = self.out_layers
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Attention over stacked queries, keys and values, split before the heads are: (b, 3 * c, n) -> (b, c, n)."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(b, n, 3 * c) -> three of (b, heads, n, d)."""
        return qkv.unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split(qkv.transpose(1, 2).contiguous())
        out = attention(q, k, v, q.shape[-1] ** -0.5)
        return out.transpose(2, 3).flatten(1, 2)


class QKVAttentionLegacy(QKVAttention):
    """The same with the heads split before queries, keys and values are: the order of most checkpoints."""

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(2, (self.n_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of (b, channels, ...), added to its input."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if num_head_channels != -1 and channels % num_head_channels:
            raise ValueError(f"{channels} channels cannot be split into heads of {num_head_channels}")
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), (), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.qkv(self.norm(x).flatten(2)))
        return x + self.proj_out(h).unflatten(2, x.shape[2:])


class Timestep(nn.Module):
    """`timestep_embedding` as a layer: (b,) -> (b, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim)


def embedding_mlp(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(linear(width_in, width), nn.SiLU(), linear(width, width))


def label_embedding(num_classes: int | str, adm_in_channels: int | None, model_channels: int, width: int) -> nn.Module:
    """The layer that turns the label y into a vector added to the time embedding.

    num_classes: how many there are (y: ids), `continuous` (y: (b, 1)), `timestep` (y: (b,), a level) or
    `sequential` (y: (b, adm_in_channels)).
    """
    match num_classes:
        case int():
            return nn.Embedding(num_classes, width)
        case "continuous":
            return linear(1, width)
        case "timestep":
            return nn.Sequential(Timestep(model_channels), embedding_mlp(model_channels, width))
        case "sequential" if adm_in_channels is not None:
            return nn.Sequential(embedding_mlp(adm_in_channels, width))
        case "sequential":
            raise ValueError("num_classes: sequential needs adm_in_channels, the width of y")
    raise ValueError(f"num_classes must be a number, continuous, timestep or sequential, got {num_classes!r}")


def per_level(value: int | Sequence[int], levels: int) -> list[int]:
    """One value for each resolution level, from one for all or from a list."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"expected one value or {levels}, one for each entry of channel_mult, got {values}")
    return values


class UNetModel(nn.Module):
    """The noise predictor of latent diffusion: (b, in_channels, h, w) -> (b, out_channels, h, w).

    With `context_dim` (or use_spatial_transformer) the attention layers also look at a context, else they are plain
    self-attention. attention_resolutions are downsampling factors, not sides. num_res_blocks, transformer_depth,
    disable_self_attentions and num_attention_blocks may be given for each level. `legacy` only lets num_heads_upsample
    count. norm_channels: how many channels are normalised together, instead of a 32nd of all. image_size is a note for
    callers; use_fp16, use_bf16 and spatial_transformer_attn_type change nothing: the weights tell the dtype,
    `ldm.modules.attention_ops` the kind of attention.
    """

    def __init__(
        self,
        image_size: int | None = None,
        in_channels: int = 4,
        model_channels: int = 320,
        out_channels: int = 4,
        num_res_blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        transformer_depth_middle: int | None = None,
        spatial_transformer_attn_type: str = "softmax",
        norm_channels: int | None = None,
    ):
        super().__init__()
        if use_spatial_transformer and context_dim is None:
            raise ValueError("use_spatial_transformer needs context_dim, the width of the context it attends to")
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("either num_heads or num_head_channels must be set")
        channel_mult = tuple(channel_mult)
        levels = len(channel_mult)
        num_res_blocks = per_level(num_res_blocks, levels)
        depths = per_level(transformer_depth, levels)
        no_self_attention = per_level(disable_self_attentions or False, levels)
        everywhere = max(num_res_blocks) + 1
        most_attention = per_level(everywhere if num_attention_blocks is None else num_attention_blocks, levels)

        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = tuple(attention_resolutions)
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.predict_codebook_ids = n_embed is not None

        width = model_channels * 4

        def residual(channels: int, out: int, **resample: bool) -> ResBlock:
            return ResBlock(
                channels,
                width,
                dropout,
                out_channels=out,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                **resample,
            )

        def attend(channels: int, depth: int, disable_self_attn: bool, plain_heads: int = num_heads) -> nn.Module:
            if context_dim is None:
                return AttentionBlock(channels, plain_heads, num_head_channels, use_checkpoint, use_new_attention_order)
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return SpatialTransformer(
                channels,
                heads,
                channels // heads,
                depth=depth,
                context_dim=context_dim,
                disable_self_attn=disable_self_attn,
                use_linear=use_linear_in_transformer,
                use_checkpoint=use_checkpoint,
            )

        self.time_embed = embedding_mlp(model_channels, width)
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, adm_in_channels, model_channels, width)

        ch = model_channels
        skips = [ch]
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))])
        for level, mult in enumerate(channel_mult):
            for i in range(num_res_blocks[level]):
                layers = [residual(ch, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in self.attention_resolutions and i < most_attention[level]:
                    layers.append(attend(ch, depths[level], no_self_attention[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < levels - 1:
                down = residual(ch, ch, down=True) if resblock_updown else Downsample(ch, conv_resample, dims, ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)

        depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.middle_block = TimestepEmbedSequential(
            residual(ch, ch), attend(ch, depth, disable_middle_self_attn), residual(ch, ch)
        )

        heads_up = num_heads_upsample if legacy and num_heads_upsample != -1 else num_heads
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks[level] + 1):
                layers = [residual(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if 2**level in self.attention_resolutions and i < most_attention[level]:
                    layers.append(attend(ch, depths[level], no_self_attention[level], heads_up))
                if level and i == num_res_blocks[level]:
                    up = residual(ch, ch, up=True) if resblock_updown else Upsample(ch, conv_resample, dims, ch)
                    layers.append(up)
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1))
        )
        if self.predict_codebook_ids:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, model_channels, n_embed, 1))
        regroup(self, norm_channels)

    @property
    def dtype(self) -> th.dtype:
        """The dtype of the weights, in which the whole network computes."""
        return self.time_embed[0].weight.dtype

    def embed_label(self, y: Tensor) -> Tensor:
        """The label as a vector (b, 4 * model_channels); `label_embedding` says what y is."""
        if isinstance(self.num_classes, int):
            return self.label_emb(y)
        if self.num_classes == "timestep":
            frequencies, mlp = self.label_emb
            return mlp(frequencies(y).to(self.dtype))
        return self.label_emb(y.to(self.dtype))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Predict from the noisy x at the timesteps (b,), whole or not; the answer has the dtype of x.

        context: (b, m, context_dim); y: the label, if and only if the model has num_classes.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("y must be given if and only if the model is class-conditional (num_classes)")
        dtype = self.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.embed_label(y)
        if th.is_tensor(context):
            context = context.to(dtype)
        h = x.to(dtype)
        skips = []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = module(th.cat([h, skips.pop()], dim=1), emb, context)
        out = self.id_predictor(h) if self.predict_codebook_ids else self.out(h)
        return out.to(x.dtype).contiguous()  # noise drawn like it must not depend on how the weights are laid out
