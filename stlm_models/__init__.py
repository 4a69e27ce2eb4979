"""Light PyTorch modules and byte-level Super Tiny Language Models on top of `stlm_kernels`."""

from stlm_kernels import __version__

from .checkpoint import load_model
from .config import BOS_ID, ModelConfig
from .evaluation import bits_per_byte
from .generation import IncrementalNgrams, IncrementalPatcher, IncrementalPooling
from .layers import (
    Attention,
    BytePatcher,
    BytePooling,
    ByteUnpooling,
    KVCache,
    Router,
    RouterState,
    Routing,
    TiedEmbedding,
)
from .model import STLM
from .presets import PRESETS

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
    "load_model",
]
