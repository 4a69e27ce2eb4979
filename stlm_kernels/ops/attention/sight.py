"""Keys that each row of a call sees, and blocks of rows over the range that any of them sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import runtime
from ..._torch import attention_blocks, segments
from ..._torch.attention_blocks import LEAST_ROWS, Block
from . import banded as bands

LEAST_BLOCK = 64
"""Rows of a block in a short window: smaller ones waste more on each op than on masked keys."""


class Options(NamedTuple):
    left: int | None  # keys that a row sees before its own; None: all
    right: int | None  # and behind it
    scale: float
    softcap: float | None
    dropout_p: float

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def windowed(self) -> bool:
        return self.left is not None or not (self.causal or self.right is None)

    def within(self, keys: int) -> Options:
        """Drop sides that reach to the ends of every sequence."""
        left = None if self.left is None or self.left >= keys - 1 else self.left
        right = None if self.right is None or self.right >= keys - 1 > 0 else self.right
        return self._replace(left=left, right=right)


class Boundaries(NamedTuple):
    """Boundaries of packed documents."""

    rows: Tensor | None  # (S+1,) int32; None: one document in each sequence
    keys: Tensor | None  # (S+1,) int32; None: those of the rows


def cutter(
    q: Tensor, k: Tensor, boundaries: Boundaries, options: Options
) -> Callable[[bool], Iterator[Block]]:
    """Function that yields the blocks of a call, told whether operands are mixed with NaN."""
    sight = sight_of(q, k, boundaries, options)
    keys = k.shape[0] * k.shape[1]
    sides = options.left, options.right
    reach = min(keys, 1 + sum(keys if side is None else side for side in sides))
    if len(sight.start) and runtime.values_readable(sight.start):
        reach = max(1, int((sight.end - sight.start).max()))
    span = partial(_span, shape=q.shape, keys=k.shape[1], boundaries=boundaries, sides=sides)
    return lambda mixed: _cut(sight, q.shape[2], reach, span, mixed)


def _span(
    first: int,
    last: int,
    shape: Sequence[int],
    keys: int,
    boundaries: Boundaries,
    sides: tuple[int | None, int | None],
) -> tuple[int, int]:
    """No row from first to last sees a key outside these, whatever the boundaries hold."""
    batch, rows = shape[:2]
    if boundaries.keys is not None:
        return 0, keys
    here, there = first // rows, (last - 1) // rows  # sequences
    left, right = (batch * keys if side is None else side for side in sides)
    low = first + (here + 1) * (keys - rows) - left
    high = last + (there + 1) * (keys - rows) + right
    return max(here * keys, low), min((there + 1) * keys, high)


def sight_of(q: Tensor, k: Tensor, boundaries: Boundaries, options: Options) -> bands.Sight:
    """Range of the keys that each row of the flat batch sees."""
    (batch, length), keys = q.shape[:2], k.shape[1]
    rows = torch.arange(batch * length, device=q.device)
    if boundaries.rows is None:
        start = rows // max(1, length) * keys
        end, offset = start + keys, (rows // max(1, length) + 1) * (keys - length)
    else:
        start, end, offset = _documents_of(rows, boundaries, length, keys)
    place, first, last = rows + offset, start, end
    if options.left is not None:
        start = torch.maximum(first, place - options.left).minimum(last)
    if options.right is not None:
        end = torch.minimum(last, place + options.right + 1).maximum(first)
    return bands.Sight(start, end)


def _documents_of(
    rows: Tensor, boundaries: Boundaries, length: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """First key of each row's document, the end of its keys, and the rows' distance from them; no
    key for rows of none."""
    assert boundaries.rows is not None
    other = boundaries.rows if boundaries.keys is None else boundaries.keys
    own = segments.clamped_bounds(boundaries.rows, length).long()
    other = segments.clamped_bounds(other, keys).long()
    document, inside = segments.find_segment(own, rows)
    own, other = (torch.cat([x[:1], x, x[-1:]]) for x in (own, other))
    start, end = (torch.where(inside, other[i], 0) for i in (document, document + 1))
    return start, end, other[document + 1] - own[document + 1]


def _cut(
    sight: bands.Sight,
    heads: int,
    reach: int,
    span: Callable[[int, int], tuple[int, int]],
    mixed: bool,
) -> Iterator[Block]:
    """Blocks of rows; row t sees the keys from start[t] to end[t]."""
    start, end = sight
    total, read = start.shape[0], runtime.values_readable(start)
    step = min(max(reach, LEAST_BLOCK), attention_blocks.BLOCK_SCORES // max(1, 2 * heads * reach))
    step = max(LEAST_ROWS, step)
    for first in range(0, total, step):
        last = min(total, first + step)
        low, high = start[first:last], end[first:last]
        sees = high > low
        if read:
            if not bool(sees.any()):
                continue
            least, most = int(low[sees].min()), int(high[sees].max())
            sighted = bool(sees.all())
        else:
            least, most = span(first, last)
            sighted = False
        keys = torch.arange(least, most, device=start.device)
        masked = (keys < low[:, None]) | (keys >= high[:, None])
        yield Block(slice(first, last), slice(least, most), masked[None], mixed or not sighted)
