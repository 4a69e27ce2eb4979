"""Followers in texts that grow byte by byte: rows of matches and memory of the newest byte."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..layers.memory import look_up_last
from .match_state import IncrementalMatches
from .stages import ByteModel


class IncrementalFollowers:
    """Matches of each row's text, and the end of it that a memory is asked about, on the host.

    Args:
        model: an `STLM`.
        batch: rows.
    """

    def __init__(self, model: ByteModel, batch: int) -> None:
        self.model = model
        self._matches: IncrementalMatches | None = None
        if model.matches is not None:
            self._matches = IncrementalMatches(batch, model.matches.sizes, model.config.vocab_size)
        if model.memory is not None:
            self._entries = model.memory.on_host()
            self._ends = np.zeros((batch, max(model.memory.sizes)), np.int64)
            self._lengths = np.zeros(batch, np.int64)

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor | None:
        """Show each of these rows (R,) its next id, of ids (B,): (R, D) where the model has any."""
        model, found = self.model, None
        if model.matches is not None and self._matches is not None:
            indices = self._matches.step(byte_ids, rows)
            found = model.matches.followers.sums(indices, self._match_rows)
        if model.memory is None:
            return found
        at = rows.tolist()
        self._ends[at, :-1] = self._ends[at, 1:]
        self._ends[at, -1] = byte_ids[rows].tolist()
        self._lengths[at] += 1
        sizes = model.memory.sizes
        found_at = look_up_last(self._entries, sizes, self._ends[at], self._lengths[at])
        indices = torch.from_numpy(found_at).to(byte_ids.device)
        known = model.memory.followers.sums(indices, self._memory_rows)
        return known if found is None else found + known

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        model = self.model
        if model.matches is not None and self._matches is not None:
            self._matches.resume(rows, byte_ids, cu_seqlens)
            self._match_rows = model.matches.followers.rows()
        if model.memory is None:
            return
        self._memory_rows = model.memory.followers.rows()
        ids, boundaries = byte_ids.tolist(), cu_seqlens.tolist()
        for row, (start, end) in zip(rows.tolist(), pairwise(boundaries), strict=True):
            last = ids[max(start, end - self._ends.shape[1]) : end]
            self._ends[row, self._ends.shape[1] - len(last) :] = last
            self._lengths[row] = end - start
