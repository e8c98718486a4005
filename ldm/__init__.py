"""Latent diffusion models: the CompVis Stable Diffusion scripts on today's stack."""

__version__ = "0.1.0"
