"""byte_pool: embedding lookup and pooling of bytes into patches in one pass."""

from .op import byte_pool

__all__ = ["byte_pool"]
