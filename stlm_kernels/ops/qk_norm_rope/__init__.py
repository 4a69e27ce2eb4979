"""qk_norm_rope: RMS norm and rotary positions of queries and keys in one pass."""

from .op import qk_norm_rope

__all__ = ["qk_norm_rope"]
