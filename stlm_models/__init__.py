"""Light PyTorch modules and byte-level Super Tiny Language Models on top of `stlm_kernels`."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .training.trainer import Trainer, TrainOptions

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
    "TrainOptions",
    "Trainer",
    "__version__",
    "bits_per_byte",
    "load_model",
]

_FOLDERS = ("compression", "data", "generation", "huggingface", "layers", "training")
_OF_TRAINING = ("TrainOptions", "Trainer")


def __getattr__(name: str) -> Any:
    """Import folders, and training with what it needs of torch.distributed, when they are used."""
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    if name in _OF_TRAINING:
        return getattr(importlib.import_module(".training.trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names and the folders; modules that something imported are neither."""
    return sorted((*__all__, *_FOLDERS))
