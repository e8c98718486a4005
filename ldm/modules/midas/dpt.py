"""DPT-hybrid (Ranftl et al. 2021): a small ResNet, a vision transformer over its features, and a decoder of both.

Attribute names are those of the published checkpoints, whose encoder is timm's `vit_base_resnet50_384`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention_ops import attention
from ldm.modules.diffusionmodules.util import normalization

PATCH = 16  # pixels to a token's side


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad (b, c, h, w) with zeros so that a window of `kernel` gives h / stride, w / stride, rounded up."""
    missing = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:]]
    down, right = missing
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


class StandardConv(nn.Conv2d):
    """A convolution by weights of mean 0 and variance 1 in each output channel (Qiao et al. 2019, eq. 7)."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (weight - mean) * (var + 1e-8).rsqrt()
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight.to(x.dtype), stride=self.stride)


class Normed(nn.Module):
    """A standardised convolution and the normalisation after it."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = StandardConv(channels, out_channels, kernel, stride)
        self.norm = normalization(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 (He et al. 2016), whose 3x3 convolution takes the stride."""

    def __init__(self, channels: int, out_channels: int, stride: int, downsample: bool):
        super().__init__()
        width = out_channels // 4
        self.downsample = Normed(channels, out_channels, 1, stride) if downsample else nn.Identity()
        self.conv1 = StandardConv(channels, width, 1)
        self.norm1 = normalization(width)
        self.conv2 = StandardConv(width, width, 3, stride)
        self.norm2 = normalization(width)
        self.conv3 = StandardConv(width, out_channels, 1)
        self.norm3 = normalization(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        h = self.norm2(self.conv2(h)).relu()
        return (self.norm3(self.conv3(h)) + self.downsample(x)).relu()


class Stage(nn.Module):
    """Residual blocks of one resolution, the first of which halves the sides if `stride` is 2."""

    def __init__(self, channels: int, out_channels: int, stride: int, count: int):
        super().__init__()
        first = Bottleneck(channels, out_channels, stride, downsample=True)
        rest = (Bottleneck(out_channels, out_channels, 1, downsample=False) for _ in range(count - 1))
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResNet(nn.Module):
    """The convolutional part: a picture to features of a quarter, an eighth and a sixteenth of its sides."""

    def __init__(self, stem: int, stages: Sequence[tuple[int, int]]):
        super().__init__()
        self.stem = Normed(3, stem, 7, 2)
        widths = (stem, *(width for width, _ in stages))
        self.stages = nn.ModuleList(
            Stage(now, then, 2 if level else 1, stages[level][1])
            for level, (now, then) in enumerate(pairwise(widths))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(pad_same(self.stem(x).relu(), 3, 2), 3, 2)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class PatchEmbed(nn.Module):
    """Each place of the last features becomes a token."""

    def __init__(self, stem: int, stages: Sequence[tuple[int, int]], width: int):
        super().__init__()
        self.backbone = ResNet(stem, stages)
        self.proj = nn.Conv2d(stages[-1][0], width, 1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A block of a vision transformer (Dosovitskiy et al. 2021, eq. 2 and 3): (b, n, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The encoder. `norm` and `head`, which classify pictures, are in the checkpoints and have no part in depth."""

    def __init__(
        self, side: int, stem: int, stages: Sequence[tuple[int, int]], width: int, depth: int, heads: int, classes: int
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // PATCH) ** 2 + 1, width))
        self.patch_embed = PatchEmbed(stem, stages, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def positions(self, height: int, width: int) -> Tensor:
        """The learned positions, stretched to a grid of height x width tokens: (1, 1 + height * width, d)."""
        first, grid = self.pos_embed.split((1, self.pos_embed.shape[1] - 1), dim=1)
        side = round(grid.shape[1] ** 0.5)
        grid = F.interpolate(grid.transpose(1, 2).unflatten(2, (side, side)), (height, width), mode="bilinear")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


class Readout(nn.Module):
    """Join the token of the whole picture to each of the others: (b, 1 + n, d) -> (b, n, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        whole = x[:, :1].expand(-1, x.shape[1] - 1, -1)
        return self.project(torch.cat([x[:, 1:], whole], dim=-1))


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Pretrained(nn.Module):
    """The encoder, and what makes pictures of its tokens again at two of its depths."""

    def __init__(self, encoder: VisionTransformer, width: int, hooks: tuple[int, int]):
        super().__init__()
        self.model = encoder
        self.hooks = hooks

        def reassemble(*more: nn.Module) -> nn.Sequential:
            # The third turns n tokens into a grid; its shape is only known with the picture's.
            return nn.Sequential(Readout(width), Transpose(), nn.Identity(), nn.Conv2d(width, width, 1), *more)

        self.act_postprocess3 = reassemble()
        self.act_postprocess4 = reassemble(nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at a quarter, an eighth, a sixteenth and a 32nd of the sides of x (b, 3, h, w)."""
        vit = self.model
        fine, middle, coarse = vit.patch_embed.backbone(x)
        grid = vit.patch_embed.proj(coarse)
        size = grid.shape[-2:]
        tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + vit.positions(*size)
        seen = []
        for number, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if number in self.hooks:
                seen.append(tokens)
        for number, post in enumerate((self.act_postprocess3, self.act_postprocess4)):
            read, turn, _, *convolve = post
            h = turn(read(seen[number])).unflatten(2, size)
            for layer in convolve:
                h = layer(h)
            seen[number] = h
        return [fine, middle, *seen]


class ResidualConvUnit(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class FeatureFusion(nn.Module):
    """Add the features of a finer level, and double the sides; the coarsest has nothing to add to."""

    def __init__(self, features: int):
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        return self.out_conv(double(self.resConfUnit2(x)))


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x)


class Scratch(nn.Module):
    """The decoder: features of four levels, finest first, to the inverse depth (b, 1, h, w), at least 0."""

    def __init__(self, widths: Sequence[int], features: int):
        super().__init__()
        for level, width in enumerate(widths, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", FeatureFusion(features))
        self.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1), Double(),
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = None
        for level in range(len(features), 0, -1):
            h = self.get_submodule(f"layer{level}_rn")(features[level - 1])
            fuse = self.get_submodule(f"refinenet{level}")
            x = fuse(h) if x is None else fuse(x, h)
        return self.output_conv(x)


class DPTDepthModel(nn.Module):
    """Inverse depth, up to scale and shift: (b, 3, h, w) in [-1, 1] -> (b, 1, h, w); sides are multiples of 32.

    side: that of the square which the positions were learned on; stages: (channels, blocks) of each level of the
    ResNet; hooks: the transformer blocks whose tokens are decoded.
    """

    def __init__(
        self,
        side: int = 384,
        stem: int = 64,
        stages: Sequence[tuple[int, int]] = ((256, 3), (512, 4), (1024, 9)),
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hooks: tuple[int, int] = (8, 11),
        features: int = 256,
        classes: int = 1000,
    ):
        super().__init__()
        self.side = side
        encoder = VisionTransformer(side, stem, stages, width, depth, heads, classes)
        self.pretrained = Pretrained(encoder, width, tuple(hooks))
        self.scratch = Scratch([stages[0][0], stages[1][0], width, width], features)

    def forward(self, x: Tensor) -> Tensor:
        return self.scratch(self.pretrained(x))
