"""Pictures as files: reading and writing them, grids, the invisible watermark, metadata."""
