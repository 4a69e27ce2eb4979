"""Followers in texts that grow byte by byte: rows of matches and memory of the newest byte."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.followers import FollowerEmbedding
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
        # Of the weights, at the first step behind a full run.
        self._tables: list[Tensor] | None = None
        self._pairs: _Pairs | None = None
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
        ids, at = byte_ids[rows].tolist(), rows.tolist()  # where a GPU is waited for
        indices = self._indices(np.array(ids, np.int64), np.array(at, np.int64))
        columns = [len(source.sizes) for source in self._sources]
        parts = torch.from_numpy(indices).to(byte_ids.device).split(columns, 1)
        if self._tables is None:
            self._tables = [source.followers.rows() for source in self._sources]
        each = zip(self._sources, parts, self._tables, strict=True)
        sums = [source.followers.sums(part, table) for source, part, table in each]
        return sum(sums[1:], sums[0])

    def host_step(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64] | slice
    ) -> NDArray[Any] | None:
        """`step` on the host, of plain modules: ids (R,) of these rows -> (R, D)."""
        if not self._sources:
            return None
        if self._pairs is None:
            self._pairs = _Pairs([source.followers for source in self._sources])
        return self._pairs.sums(self._indices(ids, rows))

    def _indices(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64] | slice
    ) -> NDArray[np.int64]:
        """(R, sizes) of matches and memory, once these rows have seen their next ids."""
        found = []
        if self._matches is not None:
            at = range(len(ids)) if isinstance(rows, slice) else rows.tolist()
            found.append(np.array(self._matches.append(ids.tolist(), at), np.int64))
        if self.model.memory is not None:
            found.append(self._recalled(ids, rows))
        return found[0] if len(found) == 1 else np.concatenate(found, 1)

    def _recalled(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64] | slice
    ) -> NDArray[np.int64]:
        """(R, sizes) of the memory, once these rows have seen their next ids."""
        assert self.model.memory is not None
        self._ends[rows, :-1] = self._ends[rows, 1:]
        self._ends[rows, -1] = ids
        self._lengths[rows] += 1
        sizes = self.model.memory.sizes
        return look_up_last(self._entries, sizes, self._ends[rows], self._lengths[rows])

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        self._tables = self._pairs = None
        if self._matches is not None:
            self._matches.resume(rows, byte_ids, cu_seqlens)
        if self.model.memory is None:
            return
        ids, boundaries = byte_ids.tolist(), cu_seqlens.tolist()
        for row, (start, end) in zip(rows.tolist(), pairwise(boundaries), strict=True):
            last = ids[max(start, end - self._ends.shape[1]) : end]
            self._ends[row, self._ends.shape[1] - len(last) :] = last
            self._lengths[row] = end - start


class _Pairs:
    """Sums of several `FollowerEmbedding`s over their sources, one behind the other, in numpy."""

    def __init__(self, each: list[FollowerEmbedding]) -> None:
        levels = np.array([x.gains.shape[1] for x in each for _ in range(x.gains.shape[0])])
        self._n_ids = np.array([len(x.ids) for x in each for _ in range(x.gains.shape[0])])
        # Behind level 0 of each source, which is no follower's, come its levels.
        self._first_level = np.cumsum(levels + 1) - (levels + 1)
        n_ids = np.array([len(x.ids) for x in each])
        self._first_id = np.repeat(n_ids.cumsum() - n_ids, [x.gains.shape[0] for x in each])
        self._ids = np.concatenate([_values(x.ids) for x in each])
        none = [torch.zeros_like(x.none) for x in each]
        self._gains = np.concatenate(
            [_with_none(x.gains, zero) for x, zero in zip(each, none, strict=True)]
        )
        self._biases = np.concatenate([_with_none(x.biases, x.none) for x in each])

    def sums(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the sums (R, D) of indices (R, sources)."""
        level, follower = np.divmod(indices - 1, self._n_ids)
        level += 1 + self._first_level
        follower += self._first_id
        rows = self._gains[level]
        rows *= self._ids[follower]
        rows += self._biases[level]
        out: NDArray[Any] = np.add.reduce(rows, 1)
        return out


def _with_none(x: Tensor, none: Tensor) -> NDArray[Any]:
    """(sources, levels, D) and a row (sources, D) before each source's, as rows (n, D)."""
    return _values(torch.cat((none[:, None], x), 1).flatten(0, 1))


def _values(x: Tensor) -> NDArray[Any]:
    values: NDArray[Any] = x.detach().numpy()
    return values
