"""Diffusion models, and the old sampler classes over ldm.sampling."""
