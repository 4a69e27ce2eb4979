"""qkv_rope: queries, keys and values of a layer of attention from its input, in one pass."""

from .op import qkv_rope

__all__ = ["qkv_rope"]
