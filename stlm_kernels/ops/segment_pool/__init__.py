"""segment_pool: hidden states of bytes pooled into patches."""

from .op import segment_pool

__all__ = ["segment_pool"]
