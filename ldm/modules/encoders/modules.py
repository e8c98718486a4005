"""The public names of the encoders, which YAML and other code import from here."""

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.conditioner import ConcatTimestepEmbedderND, GeneralConditioner
from ldm.modules.encoders.general import AbstractEncoder, ClassEmbedder, IdentityEncoder, SpatialRescaler
from ldm.modules.encoders.image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenCLIPImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.text import (
    FrozenCLIPEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
)

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "BERTTokenizer",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "ConcatTimestepEmbedderND",
    "FrozenCLIPEmbedder",
    "FrozenCLIPImageEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder2",
    "FrozenOpenCLIPImageEmbedder",
    "GeneralConditioner",
    "IdentityEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
