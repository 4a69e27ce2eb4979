"""Light PyTorch modules and byte-level Super Tiny Language Models on top of `stlm_kernels`."""

from stlm_kernels import __version__

from .bits import bits_per_byte
from .cache import KVCache
from .config import BOS_ID, PRESETS, ModelConfig
from .incremental import IncrementalNgrams, IncrementalPatcher, IncrementalPooling
from .layers import Attention, BytePatcher, BytePooling, ByteUnpooling, TiedEmbedding
from .model import STLM
from .router import Router, RouterState, Routing

__all__ = [
    "BOS_ID",
    "PRESETS",
    "STLM",
    "Attention",
    "BytePatcher",
    "BytePooling",
    "ByteUnpooling",
    "IncrementalNgrams",
    "IncrementalPatcher",
    "IncrementalPooling",
    "KVCache",
    "ModelConfig",
    "Router",
    "RouterState",
    "Routing",
    "TiedEmbedding",
    "__version__",
    "bits_per_byte",
]
