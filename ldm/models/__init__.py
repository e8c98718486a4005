"""Whole models, built from a config and filled from a checkpoint."""
