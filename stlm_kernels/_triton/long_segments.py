"""Segments too long for one program: those of more rows than a part, cut where parts end.

A part is a fixed number of rows. The launch that adds up the short segments leaves the long ones
out, and notes each at the parts whose first rows it covers. At most two long segments have rows in
a part: one that covers its first row, and one that begins behind that and covers the next part's.
A program for each part adds those rows up, another launch adds a segment's parts in their order;
where no segment is long both return at once. Importing this imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _launch
from . import config as configs

COVERS, BEGINS = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def note_long(at_ptr, segments, start, end, part_rows):
    """Note the long ones of some segments at each part whose first row they cover."""
    is_long = end - start > part_rows
    first, last = tl.cdiv(start, part_rows), tl.cdiv(end, part_rows)
    for step in range(0, tl.max(tl.where(is_long, last - first, 0), 0).to(tl.int32), 16):
        parts = first[:, None] + step + tl.arange(0, 16)[None, :]
        mask = is_long[:, None] & (parts < last[:, None])
        tl.store(at_ptr + parts, segments[:, None].to(tl.int32) + parts.to(tl.int32) * 0, mask)


@triton.jit
def _long_at(at_ptr, start_ptr, end_ptr, part, n_segments, total, part_rows):
    """Return the long segment that covers a part's first row, its first row and its end.

    0, 0 where there is none: what was not noted does not cover the row.
    """
    row = part * part_rows
    segment = tl.load(at_ptr + part, mask=row < total, other=-1).to(tl.int64)
    inside = (segment >= 0) & (segment < n_segments)
    start = tl.load(start_ptr + segment, mask=inside, other=0).to(tl.int64)
    end = tl.load(end_ptr + segment, mask=inside, other=0).to(tl.int64)
    start, end = tl.maximum(start, 0), tl.minimum(end, total)
    covers = (start <= row) & (row < end) & (end - start > part_rows)
    return segment, tl.where(covers, start, 0), tl.where(covers, end, 0)


@triton.jit
def long_rows(
    at_ptr, start_ptr, end_ptr, part, n_segments, total, part_rows, SIDE: tl.constexpr
):  # fmt: skip
    """Return first row, end and segment's first row of the long segment on one SIDE of a part."""
    first = part * part_rows
    _, start, end = _long_at(
        at_ptr, start_ptr, end_ptr, part + SIDE, n_segments, total, part_rows
    )  # fmt: skip
    if SIDE == COVERS:
        return tl.maximum(start, first), tl.minimum(end, first + part_rows), start
    else:
        begins = (start > first) & (end > start)
        return start, tl.where(begins, first + part_rows, start), start


@triton.jit
def begins_long(at_ptr, start_ptr, end_ptr, part, n_segments, total, part_rows):
    """Return the long segment that begins in a part, its first row and its end; 0, 0 if none."""
    segment, start, end = _long_at(
        at_ptr, start_ptr, end_ptr, part + 1, n_segments, total, part_rows
    )  # fmt: skip
    return segment, start, tl.where(start >= part * part_rows, end, start)


@triton.jit
def part_places(parts, first_part, start, part_rows):
    """Places of the results of the parts of a segment that begins in `first_part`, row `start`."""
    begins_inside = (parts == first_part) & (start > first_part * part_rows)
    return 2 * parts + begins_inside.to(tl.int64)


@triton.jit(do_not_specialize=["n_segments", "total", "part_rows"])
def stlm_segment_sum_long(
    x_ptr, at_ptr, start_ptr, end_ptr, partial_ptr,
    n_segments, total, part_rows,
    D: tl.constexpr, STORED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    for side in tl.static_range(2):
        first, end, _ = long_rows(
            at_ptr, start_ptr, end_ptr, part, n_segments, total, part_rows, side
        )
        if end > first:
            for column in range(0, D, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
                for row in range(first, end, BLOCK_T):
                    rows = row + tl.arange(0, BLOCK_T)
                    mask = (rows < end)[:, None] & (columns < D)[None, :]
                    x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
                    acc += x.to(STORED).to(tl.float32)  # as in stlm_segment_sum
                place = partial_ptr + (2 * part + side) * D + columns
                tl.store(place, tl.sum(acc, 0), mask=columns < D)


@triton.jit(do_not_specialize=["n_segments", "total", "part_rows"])
def stlm_long_segments(
    partial_ptr, at_ptr, start_ptr, end_ptr, out_ptr,
    n_segments, total, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program adds up the parts of the long segments that begin in PARTS parts."""
    first = tl.program_id(0).to(tl.int64) * PARTS
    _, starts, ends = begins_long(
        at_ptr, start_ptr, end_ptr, first + tl.arange(0, PARTS), n_segments, total, part_rows
    )
    if tl.max(ends - starts) > 0:
        for part in range(first, first + PARTS):
            segment, start, end = begins_long(
                at_ptr, start_ptr, end_ptr, part, n_segments, total, part_rows
            )
            for column in range(0, tl.where(end > start, D, 0), BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
                for here in range(part, tl.cdiv(end, part_rows), BLOCK_S):
                    parts = here + tl.arange(0, BLOCK_S)
                    place = part_places(parts, part, start, part_rows)
                    place = partial_ptr + place[:, None] * D + columns[None, :]
                    mask = (parts * part_rows < end)[:, None] & (columns < D)[None, :]
                    acc += tl.load(place, mask=mask, other=0.0)
                y = tl.sum(acc, 0)
                if MEAN:
                    y = y / (end - start).to(tl.float32)
                place = out_ptr + segment * D + columns
                tl.store(place, y.to(out_ptr.dtype.element_ty), mask=columns < D)


def add_long_segments(
    partial: Tensor,  # (parts, 2, D) fp32
    out: Tensor,  # (P, D)
    at: Tensor,  # (parts + 1,) int32
    starts: Tensor,  # (P,) int32
    ends: Tensor,  # (P,) int32
    total: int,
    part_rows: int,
    mean: bool,
) -> None:
    """Write the sums or means of the long segments into their rows of `out`."""
    width = out.shape[1]
    config = configs.long_segments_config(width, out.device)
    _launch.launch(
        stlm_long_segments, _launch.ceil_div(partial.shape[0], config["PARTS"]),
        partial, at, starts, ends, out, starts.shape[0], total, part_rows,
        D=width, MEAN=mean, device=out.device, **config,
    )  # fmt: skip


def notes_for(total: int, part_rows: int, device: torch.device) -> Tensor:
    """(parts + 1,) int32 for the long segments that cover the first rows of parts."""
    parts = _launch.ceil_div(total, part_rows)
    return torch.zeros(parts + 1, dtype=torch.int32, device=device)
