"""Fused Triton kernels for byte-level language models, each with a plain-PyTorch path.

Importing this package needs neither a GPU nor triton.
"""

from ._dispatch import explain
from .ops.byte_pool import byte_pool

__all__ = ["byte_pool", "explain"]
