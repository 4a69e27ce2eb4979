"""Followers in texts that grow byte by byte: rows of matches and memory of the newest byte."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
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
        self._sources = [each for each in (model.matches, model.memory) if each is not None]
        self._matches: IncrementalMatches | None = None
        if model.matches is not None:
            self._matches = IncrementalMatches(batch, model.matches.sizes, model.config.vocab_size)
        if model.memory is not None:
            self._entries = model.memory.on_host()
            self._ends = np.zeros((batch, max(model.memory.sizes)), np.int64)
            self._lengths = np.zeros(batch, np.int64)

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor | None:
        """Show each of these rows (R,) its next id, of ids (B,): (R, D) where the model has any."""
        if not self._sources:
            return None
        at, ids = rows.tolist(), byte_ids[rows].tolist()  # where a GPU is waited for
        found = []
        if self._matches is not None:
            found.append(np.array(self._matches.append(ids, at), np.int64))
        if self.model.memory is not None:
            found.append(self._recalled(ids, at))
        indices = torch.from_numpy(np.concatenate(found, 1)).to(byte_ids.device)
        parts = indices.split([len(source.sizes) for source in self._sources], 1)
        each = zip(self._sources, parts, self._tables, strict=True)
        sums = [source.followers.sums(part, table) for source, part, table in each]
        return sum(sums[1:], sums[0])

    def _recalled(self, ids: list[int], rows: list[int]) -> NDArray[np.int64]:
        """(R, sizes) of the memory, once these rows have seen their next ids."""
        assert self.model.memory is not None
        self._ends[rows, :-1] = self._ends[rows, 1:]
        self._ends[rows, -1] = ids
        self._lengths[rows] += 1
        sizes = self.model.memory.sizes
        return look_up_last(self._entries, sizes, self._ends[rows], self._lengths[rows])

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        self._tables = [source.followers.rows() for source in self._sources]
        if self._matches is not None:
            self._matches.resume(rows, byte_ids, cu_seqlens)
        if self.model.memory is None:
            return
        ids, boundaries = byte_ids.tolist(), cu_seqlens.tolist()
        for row, (start, end) in zip(rows.tolist(), pairwise(boundaries), strict=True):
            last = ids[max(start, end - self._ends.shape[1]) : end]
            self._ends[row, self._ends.shape[1] - len(last) :] = last
            self._lengths[row] = end - start
