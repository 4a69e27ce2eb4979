"""decode_attention: one query per sequence over its cache."""

from .op import decode_attention

__all__ = ["decode_attention"]
