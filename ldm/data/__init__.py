"""Datasets and the data module that training configs name."""
