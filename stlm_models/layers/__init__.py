"""Modules that a byte-level model is made of, each usable in a model of your own.

All of them take packed tensors: T bytes or P patches of all documents behind each other. A dense
(B, T, ...) is flattened, each of its rows being a document.
"""

from .attention import Attention, PatchAttention
from .embedding import TiedEmbedding, UntiedEmbedding
from .kv_cache import KVCache
from .matches import MatchEmbedding
from .memory import TextMemory
from .ngrams import NgramPooling
from .parallel_head import ParallelHead
from .patching import BytePatcher
from .pooling import BytePooling, ByteUnpooling, EmaUnpooling
from .router import Router, RouterState, Routing
from .transformer import PatchCore, SwiGLU, TransformerBlock

__all__ = [
    "Attention",
    "BytePatcher",
    "BytePooling",
    "ByteUnpooling",
    "EmaUnpooling",
    "KVCache",
    "MatchEmbedding",
    "NgramPooling",
    "ParallelHead",
    "PatchAttention",
    "PatchCore",
    "Router",
    "RouterState",
    "Routing",
    "SwiGLU",
    "TextMemory",
    "TiedEmbedding",
    "TransformerBlock",
    "UntiedEmbedding",
]
