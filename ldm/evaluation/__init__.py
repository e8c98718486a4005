"""Measuring what a model draws."""
