"""Compression of any bytes by the probabilities of a model."""

from .codec import compress, decompress

__all__ = ["compress", "decompress"]
