"""Followers in texts that grow byte by byte: rows of repeats and memory of the newest byte."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.memory import look_up_last
from .match_state import IncrementalMatches
from .stages import ByteModel
from .state import IncrementalNgrams


class IncrementalFollowers:
    """Repeats of each row's text, and the end of it that a memory is asked about.

    Args:
        model: an `STLM`.
        batch: rows.
    """

    def __init__(self, model: ByteModel, batch: int) -> None:
        self.model = model
        self._matches: IncrementalMatches | None = None
        self._ends: IncrementalNgrams | None = None
        device = model.embedding.weight.device
        if model.matches is not None:
            self._matches = IncrementalMatches(batch, model.matches.sizes, model.config.vocab_size)
        if model.memory is not None:
            self._ends = IncrementalNgrams(batch, model.memory.sizes, device=device)
            self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor | None:
        """Show each of these rows (R,) its next id, of ids (B,): (R, D) where the model has any."""
        model, found = self.model, None
        if model.matches is not None and self._matches is not None:
            found = model.matches.followers(self._matches.step(byte_ids, rows))
        if model.memory is None or self._ends is None:
            return found
        ends = self._ends.step(byte_ids)
        self._lengths += 1
        memory = model.memory
        indices = look_up_last(memory.entries, memory.sizes, ends[rows], self._lengths[rows])
        known = memory.followers(indices)
        return known if found is None else found + known

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        if self._matches is not None:
            self._matches.resume(rows, byte_ids, cu_seqlens)
        if self._ends is not None:
            self._ends.resume(rows, byte_ids, cu_seqlens)
            self._lengths[rows] = cu_seqlens.diff().long()
