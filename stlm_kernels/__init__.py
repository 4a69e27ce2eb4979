"""Fused Triton kernels for byte-level language models, each with a plain-PyTorch path.

`help(op)` has the contract of an op, `docs/numerics.md` its arithmetic. Importing this package
needs neither a GPU nor triton. It loads no triton, and nothing of torch beyond what `import torch`
does.
"""

from ._dispatch import explain
from ._version import __version__
from .ops.attention import attention
from .ops.attention_pool import attention_pool
from .ops.byte_pool import byte_pool
from .ops.decode_attention import decode_attention
from .ops.ema_unpool import ema_unpool
from .ops.find_patches import Patches, find_patches
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_kl_div import linear_kl_div
from .ops.linear_logprobs import linear_logprobs
from .ops.linear_sample import linear_sample
from .ops.ngram_embedding import ngram_embedding
from .ops.patch_attention import patch_attention
from .ops.qk_norm_rope import qk_norm_rope
from .ops.qkv_rope import qkv_rope
from .ops.segment_pool import segment_pool
from .ops.swiglu import swiglu
from .ops.unpool import unpool

__all__ = [
    "Patches",
    "__version__",
    "attention",
    "attention_pool",
    "byte_pool",
    "decode_attention",
    "ema_unpool",
    "explain",
    "find_patches",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_logprobs",
    "linear_sample",
    "ngram_embedding",
    "patch_attention",
    "qk_norm_rope",
    "qkv_rope",
    "segment_pool",
    "swiglu",
    "unpool",
]
