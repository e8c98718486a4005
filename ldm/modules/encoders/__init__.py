"""Encoders of conditions: text, pictures, classes."""
