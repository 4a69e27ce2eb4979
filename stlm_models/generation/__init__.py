"""Generation byte by byte: sampling, and the engine that runs a model over rows that grow."""

from .match_state import IncrementalMatches
from .state import IncrementalNgrams, IncrementalPatcher, IncrementalPooling

__all__ = ["IncrementalMatches", "IncrementalNgrams", "IncrementalPatcher", "IncrementalPooling"]
