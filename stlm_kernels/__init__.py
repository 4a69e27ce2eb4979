"""Fused Triton kernels for byte-level language models, each with a plain-PyTorch path.

Importing this package needs neither a GPU nor triton.
"""

from ._dispatch import explain
from .ops.attention import attention
from .ops.byte_pool import byte_pool
from .ops.find_patches import Patches, find_patches
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_logprobs import linear_logprobs
from .ops.linear_sample import linear_sample
from .ops.patch_attention import patch_attention
from .ops.segment_pool import segment_pool
from .ops.unpool import unpool

__all__ = [
    "Patches",
    "attention",
    "byte_pool",
    "explain",
    "find_patches",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_sample",
    "patch_attention",
    "segment_pool",
    "unpool",
]
