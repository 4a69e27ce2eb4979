"""`@triton.jit` helpers of attention: which rows of the other side a tile meets.

Rows of both sides lie in one stream each, B sequences or packed documents behind each other; where
one side has more rows in a sequence, the last rows stand side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import NO_WINDOW

FARTHEST = NO_WINDOW - 1024
"""The longest window: a tile on either side of it still counts in int32."""


@triton.jit
def place(block, length, other, whole, BLOCK: tl.constexpr):
    """The first row of a tile, the end of the rows that it may own, and where its first row stands
    among the rows of the other side, from where those are counted."""
    tiles = (whole + BLOCK - 1) // BLOCK
    unit = block // tiles
    base = unit * whole + block % tiles * BLOCK
    return base, (unit + 1) * whole, base + (base // length + 1) * (other - length)


@triton.jit
def sight(
    bounds_ptr, base, end, there, length, other, before, behind,
    HAS_DOCS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First of the other side's rows that each row meets, and one past the last, counted from
    `there`; equal where it meets none. `FARTHEST` keeps them int32, which masks compare cheaply."""
    own = tl.arange(0, BLOCK)
    live = base + own < end
    if HAS_DOCS:
        first = tl.load(bounds_ptr + base + own, mask=live, other=0)
        last = tl.load(bounds_ptr + end + base + own, mask=live, other=0)
    else:
        start = (base + own) // length * other
        first = tl.maximum(start, there + own - before)
        last = tl.minimum(start + other, there + own + behind + 1)
        last = tl.where(live, last, first)
    return (first - there).to(tl.int32), (last - there).to(tl.int32)


@triton.jit
def _blocks(low, high, solid_low, solid_high, INNER: tl.constexpr):
    """Numbers of all blocks from low to high, of those before the solid ones, of the solid ones."""
    count = tl.maximum(high - low + INNER - 1, 0) // INNER
    lead = tl.minimum(tl.maximum(solid_low - low + INNER - 1, 0) // INNER, count)
    solid = tl.maximum(tl.minimum(solid_high, high) - low, 0) // INNER - lead
    return count, lead, tl.maximum(solid, 0)


@triton.jit
def range_of(first, last, INNER: tl.constexpr):
    """Range that a tile meets: its rows that meet anything, the range, and its blocks as `_blocks`
    counts them."""
    live = last > first
    low = tl.min(tl.where(live, first, 2147483647), 0)
    high = tl.max(tl.where(live, last, low), 0)
    solid_low = tl.max(tl.where(live, first, low), 0)
    solid_high = tl.min(tl.where(live, last, high), 0)
    count, lead, solid = _blocks(low, high, solid_low, solid_high, INNER)
    return live, low, high, count, lead, solid
