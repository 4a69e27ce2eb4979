"""Repeats in texts that grow byte by byte: `MatchEmbedding.indices` of the newest byte of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..config import id_bits
from ..layers.matches import DEPTHS


class IncrementalMatches:
    """The text of each row, on the host, and where each of its n-grams ended last.

    On a GPU each step waits for the ids, for which the caller waits as well: it writes them.

    Args:
        batch: rows.
        sizes, vocab_size: as in `MatchEmbedding`.

    >>> matches = IncrementalMatches(1, (2,), 257)
    >>> row = torch.tensor([0])
    >>> [matches.step(torch.tensor([byte]), row).item() for byte in b"abcabcab"]
    [0, 0, 0, 0, 100, 98, 356, 357]
    """

    def __init__(self, batch: int, sizes: tuple[int, ...], vocab_size: int) -> None:
        self.sizes, self.vocab_size = sizes, vocab_size
        self._texts = [_Text(sizes, vocab_size) for _ in range(batch)]

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Show the next id, of (B,), to each of these rows (R,): their indices (R, sizes) int64."""
        found = self.append(byte_ids[rows].tolist(), rows.tolist())
        indices = torch.tensor(found, dtype=torch.int64, device=byte_ids.device)
        return indices.view(len(found), len(self.sizes))

    def append(self, ids: list[int], rows: Sequence[int]) -> list[list[int]]:
        """`step` on the host: the next id of each of these rows, and their indices."""
        return [self._texts[row].append(each) for row, each in zip(rows, ids, strict=True)]

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        ids, boundaries = byte_ids.tolist(), cu_seqlens.tolist()
        for row, (start, end) in zip(rows.tolist(), pairwise(boundaries), strict=True):
            self._texts[row] = _Text(self.sizes, self.vocab_size)
            for each in ids[start:end]:
                self._texts[row].append(each)


class _Text:
    """Ids of a text, and for each size where the latest of equal n-grams ended."""

    def __init__(self, sizes: tuple[int, ...], vocab_size: int) -> None:
        bits = id_bits(vocab_size)
        self.vocab_size, self.bits = vocab_size, bits
        self.ids: list[int] = []
        self.key = 0
        """The last ids packed, the newest in the lowest bits."""
        self.longest = (1 << bits * max(sizes)) - 1
        self.ends: list[tuple[int, int, dict[int, int]]] = [
            (size, (1 << bits * size) - 1, {}) for size in sizes
        ]

    def append(self, newest: int) -> list[int]:
        """Add an id: its index for each size, as `MatchEmbedding.indices` gives it."""
        self.ids.append(newest)
        self.key = (self.key << self.bits | newest) & self.longest
        found, last = [], len(self.ids)
        for size, mask, ends in self.ends:
            index = 0
            if last >= size:
                key = self.key & mask
                end = ends.get(key)
                ends[key] = last
                if end is not None:
                    index = 1 + (self._depth(last, end, size) - 1) * self.vocab_size + self.ids[end]
            found.append(index)
        return found

    def _depth(self, last: int, end: int, size: int) -> int:
        """Count the blocks of `size` ids that agree before two places, the first of which do."""
        ids, depth = self.ids, 1
        while depth < DEPTHS and end >= (depth + 1) * size:
            here, there = last - depth * size, end - depth * size
            if ids[here - size : here] != ids[there - size : there]:
                break
            depth += 1
        return depth
