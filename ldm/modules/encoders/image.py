"""Encoders of pictures: one CLIP vector a picture, as it is or with noise."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.checkpoint import read_object
from ldm.errors import ConfigError
from ldm.modules.diffusionmodules.openaimodel import Timestep
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.encoders.clip import CLIP_MEAN, CLIP_STD, ClipConfig, tower_config
from ldm.modules.encoders.files import WEIGHTS, pick, read_json, read_weights
from ldm.modules.encoders.general import AbstractEncoder
from ldm.modules.encoders.openclip import Clip, VisualTransformer, from_transformers, published_clip
from ldm.modules.encoders.text import OPEN_CLIP_ARCHS

logger = logging.getLogger(__name__)

# The picture towers of OpenCLIP's models that are told by name; the text towers are in OPEN_CLIP_ARCHS.
OPEN_CLIP_VISION = {"ViT-H-14": ClipConfig(width=1280, layers=32, heads=16, act="gelu")}


class PictureTower(nn.Module):
    """The picture tower of CLIP alone, under the names that it has in the whole."""

    def __init__(self, config: ClipConfig, embed: int):
        super().__init__()
        self.visual = VisualTransformer(config, embed)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)


def picture_tower(folder: Path) -> PictureTower:
    """The tower that a folder in the transformers form describes (config.json), with its weights if they are there.

    Raises ConfigError where it describes none.
    """
    source = folder / "config.json"
    found = read_json(source)
    if "projection_dim" not in found:
        raise ConfigError(f"{source} does not describe a picture tower of CLIP: it has no projection_dim")
    tower = PictureTower(tower_config(found.get("vision_config") or found, source), found["projection_dim"])
    if tower.visual.proj.is_meta:
        return tower
    if any((folder / name).is_file() for name in WEIGHTS):
        tower.load_state_dict(pick(from_transformers(read_weights(folder)), tower.state_dict(), folder))
    else:
        logger.warning("the picture tower has random weights until a checkpoint brings some: %s has none", folder)
    return tower


class ImageEncoder(AbstractEncoder):
    """The picture tower of a CLIP: (b, 3, h, w) in [-1, 1] -> forward (b, d), encode (b, 1, d).

    A list of texts stands for as many pictures of nothing, zeros, which such models were trained with for guidance.
    antialias: smooth before a picture is made smaller. ucg_rate: in training, the share of the vectors that are zero.
    """

    def __init__(self, model: nn.Module, antialias: bool, ucg_rate: float = 0.0):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.antialias, self.ucg_rate = antialias, ucg_rate

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
        vectors = self.model.encode_image(self.preprocess(x.to(self.device)).to(proj.dtype))
        if self.training and self.ucg_rate:
            vectors = vectors * (torch.rand(len(vectors), 1, device=vectors.device) >= self.ucg_rate)
        return vectors

    def encode(self, x: Tensor | Sequence[str]) -> Tensor:
        return self(x)[:, None]


class FrozenClipImageEmbedder(ImageEncoder):
    """The picture tower of a model of OpenAI's package (see ImageEncoder).

    model: a key of CLIP_PACKAGE, or a folder in the transformers form. Where a copy of the weights is on this machine
    it is read (see `published_clip`). `jit` and `device` are there for old callers.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = False,
        ucg_rate: float = 0.0,
    ):
        if (Path(model) / "config.json").is_file():
            tower = picture_tower(Path(model))
        else:
            tower = published_clip(model, vision=True)
            # The checkpoints leave out the text blocks, which pictures do not pass.
            del tower.transformer
        super().__init__(tower, antialias, ucg_rate)


FrozenCLIPImageEmbedder = FrozenClipImageEmbedder


class ClipImageEmbedder(FrozenClipImageEmbedder):
    """As FrozenClipImageEmbedder, for Stable unCLIP, which smooths pictures before they are made smaller."""

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ):
        super().__init__(model, jit, device, antialias, ucg_rate)


class FrozenOpenCLIPImageEmbedder(ImageEncoder):
    """The picture tower of an OpenCLIP model (see ImageEncoder).

    arch: a key of OPEN_CLIP_VISION, or a folder in the transformers form. layer: "pooled", one vector a picture.
    `version` names the weights, which a checkpoint must bring; what else is not used is there for old callers.
    """

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ):
        if layer != "pooled":
            raise ConfigError(f"the layer of an OpenCLIP picture encoder must be pooled, got {layer!r}")
        if (Path(arch) / "config.json").is_file():
            tower = picture_tower(Path(arch))
        elif arch in OPEN_CLIP_VISION:
            text, embed = OPEN_CLIP_ARCHS[arch]
            tower = Clip(text, OPEN_CLIP_VISION[arch], embed)
            del tower.transformer
        else:
            known = ", ".join(OPEN_CLIP_VISION)
            raise ConfigError(f"no OpenCLIP picture encoder {arch!r}: it must be a folder with config.json, or {known}")
        super().__init__(tower, antialias, ucg_rate)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """A CLIP vector (b, d) with noise of a level, in the units in which such vectors vary, and that level as a vector.

    clip_stats_path: a file of the mean and the standard deviation of such vectors, (d,) each, without which they are
    taken as 0 and 1; a checkpoint may bring them too (`data_mean`, `data_std`). timestep_dim: d.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any],
        max_noise_level: int = 1000,
        to_cuda: bool = False,
        clip_stats_path: str | None = None,
        timestep_dim: int = 256,
    ):
        super().__init__(noise_schedule_config, max_noise_level, to_cuda)
        self.clip_stats_path = clip_stats_path
        self.time_embed = Timestep(timestep_dim)
        self.schedule += ("data_mean", "data_std")  # which keep float32 too
        with torch.device("cpu"):
            mean, std = statistics(clip_stats_path, timestep_dim)
            self.register_buffer("data_mean", mean[None])
            self.register_buffer("data_std", std[None])

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The noised vectors and their levels, (b, d) each; levels (b,) and noise (b, d) are drawn where not given.

        Raises ConfigError where the statistics have been found neither in their file nor in the checkpoint.
        """
        if self.data_std.isnan().any():
            raise ConfigError("the statistics of CLIP's vectors are not in the checkpoint: put their file at "
                              f"{self.clip_stats_path}, or name it in the config as clip_stats_path")
        z, level = super().forward((x - self.data_mean) / self.data_std, noise_level, noise)
        return z * self.data_std + self.data_mean, self.time_embed(level)


def statistics(path: str | None, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dim,) of a file, 0 and 1 where none is named, NaN where it is not there.

    Raises ConfigError where the file holds something else.
    """
    if path is None:
        return torch.zeros(dim), torch.ones(dim)
    if not Path(path).is_file():
        return torch.full((dim,), torch.nan), torch.full((dim,), torch.nan)
    match read_object(path):
        case (Tensor() as mean, Tensor() as std) if mean.shape == std.shape == (dim,):
            return mean.float().clone(), std.float().clone()
    raise ConfigError(f"{path} must hold a mean and a standard deviation of {dim} numbers each")
