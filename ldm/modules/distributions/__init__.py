"""Probability distributions that networks put out."""
