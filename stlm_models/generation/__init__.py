"""Generation byte by byte: sampling, and the engine that runs a model over rows that grow."""

from .state import IncrementalNgrams, IncrementalPatcher, IncrementalPooling

__all__ = ["IncrementalNgrams", "IncrementalPatcher", "IncrementalPooling"]
