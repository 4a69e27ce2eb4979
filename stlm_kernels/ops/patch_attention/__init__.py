"""patch_attention: every byte attends within its own patch."""

from .op import patch_attention

__all__ = ["patch_attention"]
