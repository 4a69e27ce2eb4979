"""`@triton.jit` helpers of attention: which rows of the other side a tile meets.

Rows of both sides lie in one stream each, B sequences or packed documents behind each other; where
one side has more rows in a sequence, the last rows stand side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sight(
    bounds_ptr, tile, length, other, before, behind,
    HAS_DOCS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find what a tile of ROWS positions meets, for BLOCK rows that stand at them, ROWS by ROWS.

    Returns the stream's number of the tile's first row; how many it owns; that of the first row of
    the other side that any of them meets, from which the rest is counted in int32: first and one
    past the last that each row meets; one past the last that any meets; first and one past the
    last that all meet. Bounds of documents rise with the rows (`row_bounds`), so that the first and
    the last row know those of all.
    """
    own = tl.arange(0, BLOCK) % ROWS
    if HAS_DOCS:
        base = tile.to(tl.int64) * ROWS
        count = tl.minimum(length - base, ROWS).to(tl.int32)
        at = bounds_ptr + base
        low, solid_low = tl.load(at), tl.load(at + count - 1)
        solid_high, high = tl.load(at + length), tl.load(at + length + count - 1)
        first = tl.load(at + own, mask=own < count, other=0)
        last = tl.load(at + length + own, mask=own < count, other=0)
        there = low.to(tl.int64)
    else:
        tiles = ((length + ROWS - 1) // ROWS).to(tl.uint32)
        unit = (tile.to(tl.uint32) // tiles).to(tl.int64)
        start = (tile.to(tl.uint32) % tiles).to(tl.int32) * ROWS
        base = unit * length + start
        count = tl.minimum(length - start, ROWS)
        place = start + other - length  # where the first row stands on the other side
        low, solid_low = tl.maximum(-place, -before), tl.maximum(-place, count - 1 - before)
        high = tl.minimum(other - place, count + behind)
        solid_high = tl.minimum(other - place, behind + 1)
        first = tl.maximum(-place, own - before)
        last = tl.minimum(other - place, own + behind + 1)
        there = unit * other + place + low
    return (
        base,
        count,
        there,
        first - low,
        last - low,
        high - low,
        solid_low - low,
        solid_high - low,
    )
