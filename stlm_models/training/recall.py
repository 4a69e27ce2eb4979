"""Followers of each training window: its matches, and what a memory of other texts knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import ModelConfig
from ..layers.matches import MatchEmbedding
from ..layers.memory import ByteDocument, counted, look_up, units_of
from ..layers.packing import document_starts


class Recall:
    """Indices of a window by matches and memory, found on the host while the model computes.

    A memory knows its own text by heart. Trained on that, a model would trust it as it can trust no
    memory of another text: there are two, each of half the text, and a window reads the one that
    does not hold it. Halves are made of every other document (of long ones, every other unit), so
    that what a document repeats within itself is not taken for what others say either.

    Args:
        documents: as `TrainingWindows` reads them.
        config: of the model, with match_sizes or memory_sizes.
    """

    def __init__(self, documents: Sequence[ByteDocument], config: ModelConfig) -> None:
        self.matches = None
        if config.match_sizes:
            self.matches = MatchEmbedding(config.match_sizes, config.vocab_size, 1)
        self.sizes = config.memory_sizes
        if not self.sizes:
            return
        units = list(units_of(documents))
        self._starts = np.array([start for start, _ in units])
        halves = [[unit for _, unit in units[parity::2]] for parity in (0, 1)]
        entries = [counted(half, self.sizes, config.memory_slots) for half in halves]
        self._entries = [torch.from_numpy(half) for half in entries]

    def __call__(self, places: NDArray[np.int64], byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return followers (T, sizes) of packed ids (T,) at these places (T,) of the stream."""
        found = [] if self.matches is None else [self.matches.indices(byte_ids, cu_seqlens)]
        if self.sizes:
            found.append(self._recalled(places, byte_ids, cu_seqlens))
        return torch.cat(found, 1)

    def _recalled(self, places: NDArray[np.int64], byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        unit = np.searchsorted(self._starts, places, side="right") - 1
        is_odd = torch.from_numpy(unit % 2 == 1)[:, None]
        positions = torch.arange(len(byte_ids)) - document_starts(cu_seqlens, len(byte_ids))
        even, odd = (look_up(half, self.sizes, byte_ids, positions) for half in self._entries)
        return torch.where(is_odd, even, odd)
