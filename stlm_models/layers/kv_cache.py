"""Cache of a layer of attention: keys and values of the positions that rows were shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 64
"""Memory grows by at least this many positions, and to twice what there was."""


@dataclass(frozen=True)
class Slots:
    """Places of the next position of some rows, the same in every layer of a stack.

    Args:
        rows: (R,) int64, and the slot of each in `slots`, (R,) int64.
        lens: (B,) int32 positions that each row of the cache has been shown then.
        held: (R,) int32 slots of each of the rows that hold a position then.
    """

    rows: Tensor
    slots: Tensor
    lens: Tensor
    held: Tensor


class KVCache:
    """Keys and values of one layer for each row of a batch; `Attention.new_cache` makes one.

    Without a window position p of a row lies in slot p. With one only the last `window` positions
    are kept, position p in slot p % window: softmax does not care for the order of keys, which
    know their rotary position. Nothing here can be differentiated.

    Args:
        batch, kv_heads, head_dim: rows, heads, width of a head.
        window: how many positions are kept; None is all.
        dtype, device: of keys and values; None is those of the first that it is given.

    >>> layer = Attention(64, heads=4)
    >>> cache = layer.new_cache(2)
    >>> layer(torch.zeros(2, 1, 64), cache=cache).shape, cache.lens.tolist()
    (torch.Size([2, 1, 64]), [1, 1])
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.window, self._dtype = window, dtype
        self.by_head = torch.zeros(2, batch, kv_heads, 0, head_dim, dtype=dtype, device=device)
        """(2, B, H_kv, C, K) keys, then values; C grows when a row needs it."""
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        """(B,) how many positions each row has been shown."""
        self.longest = 0
        """No row has been shown more positions; may be more than the longest row was shown."""

    @property
    def k(self) -> Tensor:
        """(B, C, H_kv, K) keys, as `decode_attention` takes them."""
        return self.by_head[0].transpose(1, 2)

    @property
    def v(self) -> Tensor:
        """(B, C, H_kv, K) values."""
        return self.by_head[1].transpose(1, 2)

    @property
    def capacity(self) -> int:
        """Positions C that there is room for."""
        return self.by_head.shape[3]

    def at(self, rows: Tensor) -> CacheRows:
        """The cache of these rows, (R,) int64, in this order and each once; others stay."""
        return CacheRows(self, rows)

    def positions(self) -> Tensor:
        """(B,) the position that comes next in each row."""
        return self.lens

    def next_slots(self, *, rows: Tensor | None = None) -> Slots:
        """Where `append` puts the next position of each row."""
        lens = self.lens if rows is None else self.lens[rows]
        after = lens + 1
        held = after if self.window is None else after.clamp(max=self.window)
        if rows is None:
            every = torch.arange(len(lens), device=lens.device)
            return Slots(every, self._slots(lens.long()), after, held)
        return Slots(rows, self._slots(lens.long()), self.lens.index_copy(0, rows, after), held)

    def fill(self, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, rows: Tensor | None = None) -> None:
        """Begin each row anew with a document: packed k, v (T, H_kv, K), cu_seqlens (B+1,).

        Raises:
            ValueError: for another number of documents than rows.
        """
        self._adopt(k)
        expected = len(self.lens) if rows is None else len(rows)
        lens = cu_seqlens.diff()
        if len(lens) != expected:
            raise ValueError(f"cu_seqlens: expected {expected} documents, got {len(lens)}")
        rows = torch.arange(expected, device=k.device) if rows is None else rows
        documents = torch.repeat_interleave(lens)
        used = torch.arange(len(documents), device=k.device)
        positions = used - cu_seqlens[documents]
        if self.window is not None:
            kept = positions >= lens[documents] - self.window
            used, documents, positions = used[kept], documents[kept], positions[kept]
        # Layers may hold one tensor: it is replaced, never changed.
        self.lens = self.lens.index_copy(0, rows, lens.to(self.lens.dtype))
        self.longest = int(self.lens.max()) if len(self.lens) else 0
        self.reserve(self.longest)
        # What is left of a text may be NaN, of which even a weight of zero makes NaN.
        self.by_head.index_fill_(1, rows, 0)
        at = rows[documents], self._slots(positions)
        self.k[at], self.v[at] = (x.detach()[used].to(self.k.dtype) for x in (k, v))

    def append(
        self, k: Tensor, v: Tensor, *, rows: Tensor | None = None, slots: Slots | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add one position, k and v (B, H_kv, K), to each row.

        Args:
            slots: of `next_slots`, where layers share it; None makes it.

        Returns:
            keys and values (B, C, H_kv, K) and how many slots of each row hold one, (B,) int32:
            what `decode_attention` takes.
        """
        self._adopt(k)
        if self.longest >= self.capacity and self.capacity != self.window:
            # Rows that were begun anew, or that skip steps, leave `longest` too high.
            self.longest = int(self.lens.max())
            self.reserve(self.longest + 1)
        slots = self.next_slots(rows=rows) if slots is None else slots
        at = slots.rows, slots.slots
        self.k[at], self.v[at] = (x.detach().to(self.k.dtype) for x in (k, v))
        self.lens = slots.lens
        self.longest += 1
        held = self.longest if self.window is None else min(self.longest, self.window)
        keys, values = self.k[:, :held], self.v[:, :held]
        if rows is not None:
            keys, values = keys[rows], values[rows]
        return keys, values, slots.held

    def _adopt(self, k: Tensor) -> None:
        """Move to the keys' device, in their dtype unless another is set, while nothing is kept."""
        if self.capacity == 0:
            dtype = k.dtype if self._dtype is None else self._dtype
            self.by_head, self.lens = self.by_head.to(k.device, dtype), self.lens.to(k.device)

    def _slots(self, positions: Tensor) -> Tensor:
        return positions if self.window is None else positions % self.window

    def reserve(self, positions: int) -> None:
        """Make room for rows of this many positions."""
        capacity = self.capacity
        needed = positions if self.window is None else min(positions, self.window)
        if needed <= capacity:
            return
        grown = -(-max(needed, 2 * capacity) // ROUNDING) * ROUNDING
        grown = grown if self.window is None else min(grown, self.window)
        # Zeros, because even a weight of zero makes NaN of what uninitialised memory may hold.
        before = self.by_head
        more = before.new_zeros(*before.shape[:3], grown - capacity, before.shape[4])
        self.by_head = torch.cat((before, more), 3)


@dataclass(frozen=True)
class CacheRows:
    """Some rows of a cache, where a layer expects a `KVCache`."""

    cache: KVCache
    rows: Tensor

    @property
    def longest(self) -> int:
        return self.cache.longest

    def positions(self) -> Tensor:
        return self.cache.lens[self.rows]

    def fill(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
        self.cache.fill(k, v, cu_seqlens, rows=self.rows)

    def next_slots(self) -> Slots:
        return self.cache.next_slots(rows=self.rows)

    def append(
        self, k: Tensor, v: Tensor, *, slots: Slots | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.cache.append(k, v, rows=self.rows, slots=slots)
