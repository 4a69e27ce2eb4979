"""Repeats in texts that grow byte by byte: `MatchEmbedding.indices` of the newest byte of each."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..layers.matches import DEPTHS

WIDTH = 4
"""Bytes of an id as kept."""


class IncrementalMatches:
    """The text of each row, on the host: a search of bytes finds the latest repeat at once.

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
        self._texts = [bytearray() for _ in range(batch)]

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Show the next id, of (B,), to each of these rows (R,): their indices (R, sizes) int64."""
        found = []
        for row, code in zip(rows.tolist(), _encoded(byte_ids[rows]), strict=True):
            text = self._texts[row]
            text += code
            found.append([_index(text, size, self.vocab_size) for size in self.sizes])
        indices = torch.tensor(found, dtype=torch.int64, device=byte_ids.device)
        return indices.view(len(rows), len(self.sizes))

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends."""
        codes, boundaries = _encoded(byte_ids), cu_seqlens.tolist()
        for row, (start, end) in zip(rows.tolist(), pairwise(boundaries), strict=True):
            self._texts[row] = bytearray(b"".join(codes[start:end]))


def _encoded(ids: Tensor) -> list[bytes]:
    return [i.to_bytes(WIDTH, "little") for i in ids.tolist()]


def _index(text: bytearray, size: int, vocab_size: int) -> int:
    """The index of the last id of a text, as `MatchEmbedding.indices` gives it."""
    block = size * WIDTH
    end = _latest_repeat(text, block)
    if end < 0:
        return 0
    follower = int.from_bytes(text[end : end + WIDTH], "little")
    depth, last = 1, len(text)
    while depth < DEPTHS and end >= (depth + 1) * block:
        here, there = last - depth * block, end - depth * block
        if text[here - block : here] != text[there - block : there]:
            break
        depth += 1
    return 1 + (depth - 1) * vocab_size + follower


def _latest_repeat(text: bytearray, block: int) -> int:
    """Where the latest earlier copy of the text's last `block` bytes ends; -1 without one."""
    if len(text) < block:
        return -1
    suffix, end = text[-block:], len(text) - WIDTH
    while True:
        start = text.rfind(suffix, 0, end)
        if start < 0 or start % WIDTH == 0:
            return start + block if start >= 0 else -1
        end = start + block - 1  # within an id, and so none
