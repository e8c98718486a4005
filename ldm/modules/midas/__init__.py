"""Depth from one picture: the MiDaS network that comes inside the depth-to-image checkpoints."""
