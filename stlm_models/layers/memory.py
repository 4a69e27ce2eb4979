"""Memory of a text: which byte followed a context in it most often, and how surely."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import BOS_ID, BYTES, LONGEST_CONTEXT, check_memory
from .followers import FollowerEmbedding
from .matches import MatchEmbedding
from .packing import document_starts
from .typed_call import typed_as

Words = TypeVar("Words", Tensor, NDArray[np.int64])
"""Arrays of 64 bits, on the host while a text is counted; products wrap."""
ByteDocument = bytes | memoryview
MOST_BYTES, UNIT = 2**24, 2**18
"""Bytes of a text that are remembered at most, and in a unit of it."""
LEVELS = 9
"""Degrees of sureness: five of contexts with one follower, by how often it was seen; four of
others, by the share of the most frequent one.
"""
_OFTEN = np.array([2, 3, 6, 16])
_SHARES = np.array([0.4, 0.65, 0.9])
_BYTE_BITS, _LEVEL_BITS, _CHECK_BITS = 8, 4, 20
_CHECK_SHIFT, _CHECK_MASK = _BYTE_BITS + _LEVEL_BITS, (1 << _CHECK_BITS) - 1
_KNUTH, _GOLDEN = 6364136223846793005, -7046029254386353131
"""Odd multipliers of a hash of 64 bits: Knuth's of MMIX, and 2**64 over the golden ratio."""
_POWERS = [(pow(_KNUTH, n, 2**64) + 2**63) % 2**64 - 2**63 for n in range(LONGEST_CONTEXT)]


class TextMemory(nn.Module):
    """Embedding of the byte that followed each byte's context most often in a remembered text.

    For each `size`, the last `size` ids of a position are looked up in a hashed table of the
    contexts of a text: the byte that followed there most often, and a level of sureness from how
    often it and others did, which `FollowerEmbedding` embeds. The table is counted by `remember`,
    not trained: one look at a text suffices, as in PPM (Cleary and Witten 1984), while what its
    predictions are worth is learned. It is part of the state dict. A position reads the ids up to
    its own, never the next.

    A model must be trained on predictions of a memory that does not hold the very text at hand, or
    it learns to trust it too much: see `stlm_models.training.recall`.

    Args:
        sizes: lengths of contexts, 1 to 64 ids.
        slots: entries of 4 bytes for contexts of all sizes, a power of two; where two contexts meet
            the more frequent one stays.
        dim: width of the result, the sum over sizes.

    Raises:
        ValueError: for sizes or slots out of range.

    >>> memory = TextMemory((2,), 1024, 16)
    >>> memory.remember([b"abcabd abc"])
    >>> memory.indices(torch.tensor([*b"xab"]), torch.tensor([0, 3], dtype=torch.int32))[2] % 256
    tensor([100])
    """

    entries: Tensor

    def __init__(self, sizes: tuple[int, ...], slots: int, dim: int) -> None:
        super().__init__()
        check_memory(sizes, slots)
        self.sizes, self.slots = sizes, slots
        self.register_buffer("entries", torch.zeros(slots, dtype=torch.int32))
        self.followers = FollowerEmbedding(len(sizes), LEVELS, BYTES, dim)

    def forward(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """byte_ids (T,), cu_seqlens (S+1,) -> (T, dim)."""
        return self.followers(self.indices(byte_ids, cu_seqlens))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def indices(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T, sizes) int64: 0 for an unknown context, else 1 + (level - 1) * 256 + follower."""
        starts = document_starts(cu_seqlens, len(byte_ids))
        positions = torch.arange(len(byte_ids), device=byte_ids.device) - starts
        return look_up(self.entries, self.sizes, byte_ids, positions)

    def on_host(self) -> NDArray[np.int32]:
        """Entries for `look_up_last`; on a CPU without a copy."""
        return self.entries.numpy(force=True)

    @torch.no_grad()
    def remember(self, documents: Sequence[ByteDocument]) -> None:
        """Count the contexts of these documents, each behind id 256, in place of what was known.

        Of more than `MOST_BYTES` as many are read, in units spread over all: a longer text has
        more contexts than there are entries, and counting takes about 120 bytes of memory for each.
        """
        self.entries.copy_(torch.from_numpy(counted(documents, self.sizes, self.slots)))


def follower_rows(
    matches: MatchEmbedding | None,
    memory: TextMemory | None,
    byte_ids: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S+1,)
    followers: Tensor | None = None,  # (T, sizes)
) -> Tensor | None:  # (T, dim)
    """Return the rows of matches and of a memory together; None where there is neither.

    Args:
        followers: indices of both, those of matches first, in place of what is found here.

    Raises:
        ValueError: for followers of another shape.
    """
    sources = [source for source in (matches, memory) if source is not None]
    if followers is not None:
        columns = [len(source.sizes) for source in sources]
        expected, got = (len(byte_ids), sum(columns)), tuple(followers.shape)
        if got != expected:
            raise ValueError(f"followers: expected shape {expected}, got {got}")
        parts = followers.split(columns, 1)
        rows = [source.followers(part) for source, part in zip(sources, parts, strict=True)]
    else:
        rows = [source(byte_ids, cu_seqlens) for source in sources]
    return sum(rows[1:], rows[0]) if rows else None


def look_up(entries: Tensor, sizes: tuple[int, ...], byte_ids: Tensor, positions: Tensor) -> Tensor:
    """`TextMemory.indices` of ids (T,) at these positions (T,) of their documents."""
    by_size = dict(_keys(byte_ids.long(), sizes, torch.roll))
    keys = torch.stack([by_size[size] for size in sizes], 1)
    least = torch.tensor(sizes, device=keys.device) - 1
    entry = entries[_slot(keys, len(entries))].long()
    return _index(entry, keys) * (positions[:, None] >= least)


def look_up_last(
    entries: NDArray[np.int32],  # (slots,)
    sizes: tuple[int, ...],
    last_ids: NDArray[np.int64],  # (B, n), n at least the longest of sizes, the newest id last
    lengths: NDArray[np.int64],  # (B,) ids that each text has
) -> NDArray[np.int64]:  # (B, sizes)
    """`TextMemory.indices` of the newest ids of texts, on the host."""
    powers, each = _columns(sizes)
    newest_first = last_ids[:, : -1 - len(powers) : -1]
    sums = ((newest_first + 1) * powers).cumsum(1)
    keys = _mixed(sums[:, each - 1])
    entry = entries[_slot(keys, len(entries))].astype(np.int64)
    return _index(entry, keys) * (lengths[:, None] >= each)


@functools.cache
def _columns(sizes: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Powers of the multiplier for the longest of sizes, and sizes."""
    return np.array(_POWERS[: max(sizes)]), np.array(sizes)


def _index(entry: Words, keys: Words) -> Words:
    """The index that an entry stands for; 0 where it is another context's."""
    row = 1 + (entry & ((1 << _CHECK_SHIFT) - 1)) - BYTES
    known = (entry >> _CHECK_SHIFT) & _CHECK_MASK == keys & _CHECK_MASK
    return row * (known & (row > 0))


def counted(
    documents: Sequence[ByteDocument], sizes: tuple[int, ...], slots: int
) -> NDArray[np.int32]:
    """Return the entries (slots,) of these documents, or of `MOST_BYTES` spread over them."""
    documents = spread_over(documents, MOST_BYTES)
    ids = np.concatenate([np.empty(0, np.int16), *map(_with_start, documents)])
    lengths = np.fromiter((len(document) + 1 for document in documents), np.int64)
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    positions = np.arange(len(ids)) - starts
    followed = np.append(ids[1:] != BOS_ID, False)[: len(ids)]
    entries, often = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    for size, keys in _keys(ids.astype(np.int64), sizes, np.roll):
        counts = followed & (positions >= size - 1)
        place = (_slot(keys, slots) << _CHECK_BITS | keys & _CHECK_MASK)[counts]
        codes = place << _BYTE_BITS | ids[1:][counts[:-1]]
        codes.sort()
        _enter(entries, often, codes)
    return entries


def units_of(documents: Sequence[ByteDocument]) -> Iterator[tuple[int, ByteDocument]]:
    """Yield documents with the place of each in them all, long ones cut into units of `UNIT`.

    A document and its id 256 take one place more than it has bytes.
    """
    start = 0
    for document in documents:
        for at in range(0, len(document), UNIT):
            yield start + at, document[at : at + UNIT]
        start += len(document) + 1


def spread_over(documents: Sequence[ByteDocument], most: int) -> Sequence[ByteDocument]:
    """All documents, or where they have more than `most` bytes, every so many of their units."""
    total, left = sum(map(len, documents)), most
    if total <= most:
        return documents
    chosen = []
    for _, unit in itertools.islice(units_of(documents), 0, None, -(-total // most)):
        if len(unit) <= left:
            chosen.append(unit)
            left -= len(unit)
    return chosen


def _enter(
    entries: NDArray[np.int32],  # (slots,)
    often: NDArray[np.int32],  # (slots,) how often the context of each entry was seen
    codes: NDArray[np.int64],  # ordered: slot, check and follower of each place of a text
) -> None:
    """Write the entries of contexts that were seen more often than what stands in their slots."""
    if not len(codes):
        return
    first = _begins(codes)
    times = np.diff(np.append(first, len(codes)))
    context, follower = codes[first] >> _BYTE_BITS, codes[first] & (BYTES - 1)
    begin = _begins(context)
    total = np.add.reduceat(times, begin)
    best = np.maximum.reduceat(times << _BYTE_BITS | follower, begin)
    context, follower, most = context[begin], best & (BYTES - 1), best >> _BYTE_BITS
    begin = _begins(context >> _CHECK_BITS)
    # Of the contexts of a slot the most frequent one, by the number of its place among all.
    kept = np.maximum.reduceat(total << 32 | np.arange(len(total)), begin) & ((1 << 32) - 1)
    kept = kept[total[kept] > often[context[kept] >> _CHECK_BITS]]
    slot = context[kept] >> _CHECK_BITS
    value = (context[kept] & _CHECK_MASK) << _CHECK_SHIFT
    value |= _level(most[kept], total[kept]) << _BYTE_BITS | follower[kept]
    entries[slot], often[slot] = value.astype(np.uint32).view(np.int32), total[kept]


def _level(most: NDArray[np.int64], total: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 to LEVELS."""
    only = np.searchsorted(_OFTEN, most, side="right")
    shared = len(_OFTEN) + 1 + np.searchsorted(_SHARES, most / total, side="right")
    return 1 + np.where(most == total, only, shared)


def _begins(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of ordered x that differ from the one before."""
    return np.flatnonzero(np.append(True, x[1:] != x[:-1]))


def _with_start(document: ByteDocument) -> NDArray[np.int16]:
    return np.append(np.int16(BOS_ID), np.frombuffer(document, np.uint8).astype(np.int16))


def _keys(
    ids: Words, sizes: tuple[int, ...], roll: Callable[[Words, int], Words]
) -> Iterator[tuple[int, Words]]:
    """Each size, ascending, and the hash of the last `size` ids of each position (T,).

    The first positions wrap. One at a time, for those of a text are large.
    """
    total = ids * 0
    for n in range(max(sizes)):
        total = total + (roll(ids, n) + 1) * _POWERS[n]
        if n + 1 in sizes:
            yield n + 1, _mixed(total)


def _mixed(sums: Words) -> Words:
    """Spread what tells sums apart over all bits."""
    mixed = (sums ^ (sums >> 32)) * _GOLDEN
    mixed = (mixed ^ (mixed >> 29)) * _GOLDEN
    return mixed ^ (mixed >> 32)


def _slot(keys: Words, slots: int) -> Words:
    return (keys >> _CHECK_BITS) & (slots - 1)
