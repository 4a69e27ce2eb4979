"""Repeats of a text: which byte followed the last time that it went as it does now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import check_match_sizes, id_bits
from .followers import FollowerEmbedding
from .packing import document_starts
from .typed_call import typed_as

DEPTHS = 8
"""Most blocks of `size` ids that a match is followed back; a longer one counts as this long."""


class MatchEmbedding(nn.Module):
    """Embedding of what followed the latest earlier occurrence of the ids that end at each byte.

    For each `size`: the latest earlier position of the same document where the same `size` ids
    end, the id behind it, and how many blocks of `size` ids agree there, up to `DEPTHS`, which
    `FollowerEmbedding` embeds. Nothing reads ahead: the id that followed stands at or before the
    byte itself. It is the match model of PAQ, a context-mixing compressor (Mahoney 2005), with what
    it predicts learned.

    Args:
        sizes: lengths of what must repeat, each at least 1 and short enough for ids of `vocab_size`
            to pack into 63 bits: 7 for bytes.
        vocab_size: ids.
        dim: width of the result, the sum over sizes.

    Raises:
        ValueError: for sizes out of range.

    >>> ids, cu_seqlens = torch.tensor([*b"abcabcab"]), torch.tensor([0, 8], dtype=torch.int32)
    >>> matches = MatchEmbedding((2,), 257, 16)
    >>> matches.indices(ids, cu_seqlens)[:, 0].tolist()  # "ab", "bc", then "ca" and "ab" of depth 2
    [0, 0, 0, 0, 100, 98, 356, 357]
    """

    def __init__(self, sizes: tuple[int, ...], vocab_size: int, dim: int) -> None:
        super().__init__()
        check_match_sizes(sizes, vocab_size)
        self.sizes, self.vocab_size = sizes, vocab_size
        self.followers = FollowerEmbedding(len(sizes), DEPTHS, vocab_size, dim)

    def forward(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """byte_ids (T,), cu_seqlens (S+1,) -> (T, dim)."""
        return self.followers(self.indices(byte_ids, cu_seqlens))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def indices(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T, sizes) int64: 0 without a match, else 1 + (depth - 1) * vocab_size + follower."""
        ids = byte_ids.long()
        starts = document_starts(cu_seqlens, len(ids))
        return torch.stack([self._indices(ids, starts, size) for size in self.sizes], 1)

    def _indices(self, ids: Tensor, starts: Tensor, size: int) -> Tensor:
        places = torch.arange(len(ids), device=ids.device)
        keys = _keys(ids, places - starts, size, id_bits(self.vocab_size))
        found = _latest_equal(keys)
        is_match = found >= starts
        found = torch.where(is_match, found, 0)
        depth, agrees = is_match.long(), is_match
        for block in range(1, DEPTHS):
            back = size * block
            # The blocks of both must be whole: keys that reach across a start equal none.
            here, there = (places - back).clamp(min=0), (found - back).clamp(min=0)
            agrees = agrees & (found >= starts + back) & (keys[here] == keys[there])
            depth = depth + agrees
        row = 1 + (depth - 1) * self.vocab_size + ids[(found + 1).clamp(max=len(ids) - 1)]
        return torch.where(is_match, row, 0)


def _keys(ids: Tensor, positions: Tensor, size: int, bits: int) -> Tensor:
    """The last `size` ids of each position of a document, packed; a number of its own without."""
    keys = ids
    for back in range(1, size):
        keys = keys | (ids.roll(back) << (bits * back))
    own = -1 - torch.arange(len(ids), device=ids.device)
    return torch.where(positions >= size - 1, keys, own)


def _latest_equal(keys: Tensor) -> Tensor:
    """The latest earlier position with the same key as each, (T,) int64; -1 where there is none."""
    ordered, order = keys.sort(stable=True)
    before = torch.where(ordered[1:] == ordered[:-1], order[:-1], -1)
    return torch.full_like(order, -1).scatter(0, order[1:], before)
