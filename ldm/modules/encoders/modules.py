"""The public names of the encoders, which YAML and other code import from here."""

from ldm.modules.encoders.text import AbstractEncoder, FrozenCLIPEmbedder

__all__ = ["AbstractEncoder", "FrozenCLIPEmbedder"]
