"""`@triton.jit` helpers that two ops or more share. Importing this imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import _launch
from . import config as configs
from .long_segments import add_long_segments, note_long, notes_for, stlm_segment_sum_long

NO_WINDOW = 2**31 - 1
LOG2_E = 1.4426950408889634


@triton.jit
def segment_bounds(cu_ptr, segment, mask, total):
    """First and one-past-last position of each segment, safe for any offsets.

    Offsets are clamped to [0, total] and a negative length is empty, so that nothing a caller
    hands over on a GPU, where values are not checked, can address memory out of bounds.
    """
    start = tl.load(cu_ptr + segment, mask=mask, other=0).to(tl.int64)
    end = tl.load(cu_ptr + segment + 1, mask=mask, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    end = tl.minimum(tl.maximum(end, start), total)
    return start, end


INTERPRETED = isinstance(segment_bounds, InterpretedFunction)
"""Flag of kernels that triton decorated for its interpreter, so that they run on a CPU."""


@triton.jit
def side_by_side(BLOCK: tl.constexpr, EACH: tl.constexpr):
    """Numbers from 0 to BLOCK, of which each thread takes EACH neighbours: 16 bytes at most.

    Eight of a 16-bit tensor would have a thread read an fp32 tensor beside it in two loads of 16
    bytes, each of which touches every sector; several of bytes are as many loads of one byte.
    """
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), EACH), EACH)


@triton.jit
def _sum_block(
    partial_ptr, out_ptr, splits, size, block, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK results: split s joins the sum s % BLOCK_S, and those are added last."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < size
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in tl.range(0, splits, BLOCK_S, loop_unroll_factor=4):
        here = first + tl.arange(0, BLOCK_S)
        place = partial_ptr + here.to(tl.int64)[:, None] * size + offsets[None, :]
        acc += tl.load(place, mask=(here < splits)[:, None] & live[None, :], other=0.0)
    tl.store(out_ptr + offsets, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["splits", "more_splits"])
def stlm_sum_splits(
    partial_ptr, out_ptr, splits, size, more_ptr, more_out_ptr, more_splits, more_size,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK results, of `more` after all others where there are more."""
    block = tl.program_id(0)
    if more_ptr is None:
        _sum_block(partial_ptr, out_ptr, splits, size, block, BLOCK_S, BLOCK)
    else:
        before = tl.cdiv(size, BLOCK)
        if block < before:
            _sum_block(partial_ptr, out_ptr, splits, size, block, BLOCK_S, BLOCK)
        else:
            _sum_block(
                more_ptr, more_out_ptr, more_splits, more_size, block - before, BLOCK_S, BLOCK
            )


def sum_splits(
    partial: Tensor,  # (splits, ...) fp32, contiguous
    dtype: torch.dtype,
) -> Tensor:
    """Add up the partial results of a split reduction in an order that is fixed, and cast once.

    Floor: 4 bytes for each partial result, and the bytes of the sums. A program waits for the
    memory ceil(splits / 32) times, 17 times for 528 splits.
    """
    return sum_each([partial], [dtype])[0]


def sum_each(
    partials: Sequence[Tensor], dtypes: Sequence[torch.dtype], wanted: Sequence[bool] = (True, True)
) -> list[Tensor]:
    """`sum_splits` of one or two tensors in one launch; empty where not wanted."""
    outs = [
        torch.empty(x.shape[1:] if want else 0, dtype=dtype, device=x.device)
        for x, dtype, want in zip(partials, dtypes, wanted, strict=False)
    ]
    operands: list[list[Any]] = [
        [x, out, x.shape[0], out.numel()]
        for x, out, want in zip(partials, outs, wanted, strict=False)
        if want
    ]
    if not operands:
        return outs
    config = configs.sum_splits_config(
        *max((x[2:] for x in operands), key=math.prod), outs[0].device
    )
    programs = sum(_launch.ceil_div(x[3], config["BLOCK"]) for x in operands)
    more = operands[1] if len(operands) == 2 else [None, None, 0, 0]
    _launch.launch(stlm_sum_splits, programs, *operands[0], *more, device=outs[0].device, **config)
    return outs


def sum_of_norms(
    partials: Sequence[Tensor], weights: Sequence[Tensor | None], other: torch.dtype
) -> list[Tensor]:
    """Gradients of norm weights; empty, in the other dtype, of what is not there."""
    dtypes = [other if weight is None else weight.dtype for weight in weights]
    return sum_each(partials, dtypes, [weight is not None for weight in weights])


@triton.jit
def segment_at(
    cu_ptr, position, n_segments, PROBES: tl.constexpr = 128, WORK: tl.constexpr = 0
):  # fmt: skip
    """Find the last segment that starts at or before one position, PROBES offsets at a time.

    Positions count the rows before, and WORK for each segment before.
    """
    low = tl.full((), -1, tl.int32)
    span = n_segments + 1  # it is one of low .. low + span
    while span > 0:
        step = tl.cdiv(span, PROBES)
        probes = low + (1 + tl.arange(0, PROBES)) * step
        start = tl.load(cu_ptr + probes, mask=probes <= n_segments, other=0)
        start = start.to(tl.int64) + probes.to(tl.int64) * WORK
        low += tl.sum(((start <= position) & (probes <= n_segments)).to(tl.int32), 0) * step
        span = step - 1
    return low


@triton.jit
def _is_behind(cu_ptr, segment, n_segments, position):
    """Return True where there is such a segment and it starts behind the position."""
    start = tl.load(cu_ptr + segment, mask=segment <= n_segments, other=-1)
    return start.to(tl.int64) > position


@triton.jit
def segments_of(cu_ptr, first, n_segments, BLOCK: tl.constexpr):
    """Find the last segment that starts at or before each of BLOCK positions from `first` on.

    -1 if there is none; n_segments for positions beyond the last offset. Three rounds of loads find
    one of 2 million for the first position; the others' are the same, or near unless many segments
    are empty.
    """
    at_first = segment_at(cu_ptr, first, n_segments)
    return segments_from(cu_ptr, at_first, first, n_segments, BLOCK)


@triton.jit
def segments_from(cu_ptr, at_first, first, n_segments, BLOCK: tl.constexpr):
    """Find the same where the first position's segment is known, or one before it."""
    positions = first + tl.arange(0, BLOCK)
    last = first + BLOCK - 1
    span = n_segments + 1 - at_first
    span = tl.where(_is_behind(cu_ptr, at_first + BLOCK, n_segments, last), BLOCK, span)
    span = tl.where(_is_behind(cu_ptr, at_first + 1, n_segments, last), 1, span)
    low = tl.zeros((BLOCK,), tl.int32) + at_first
    high = low + span
    while span > 1:
        middle = (low + high) // 2
        inside = high - low > 1
        below = tl.load(cu_ptr + middle, mask=inside, other=0).to(tl.int64) <= positions
        low = tl.where(inside & below, middle, low)
        high = tl.where(inside & ~below, middle, high)
        span = (span + 1) // 2
    return low


@triton.jit(do_not_specialize=["n_segments", "total", "chunks", "part_rows"])
def stlm_segment_sum(
    x_ptr, start_ptr, end_ptr, out_ptr, at_ptr,
    n_segments, total, chunks, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_P segments x BLOCK_D columns and walks their rows together; it notes
    those of more than `part_rows` rows, which get zeros."""
    program = tl.program_id(0).to(tl.int64)
    columns = (program // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    segments = (program % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = segments < n_segments
    start = tl.load(start_ptr + segments, mask=own, other=0).to(tl.int64)
    end = tl.load(end_ptr + segments, mask=own, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    end = tl.minimum(tl.maximum(end, start), total)
    stored = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    longest = tl.max(end - start).to(tl.int32)
    if longest > part_rows:
        note_long(at_ptr, segments, start, end, part_rows)
        end = tl.where(end - start > part_rows, start, end)
        longest = part_rows.to(tl.int32)
    for slot in range(0, longest):
        rows = start + slot
        mask = (rows < end)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
        acc += x.to(stored).to(tl.float32)  # under autocast x is wider than the result
    if MEAN:
        acc = acc / tl.maximum(end - start, 1).to(tl.float32)[:, None]
    mask = own[:, None] & (columns < D)[None, :]
    tl.store(out_ptr + segments[:, None] * D + columns[None, :], acc.to(stored), mask=mask)


def segment_sum(
    x: Tensor,  # (T, D)
    starts: Tensor,  # (P,) int32
    ends: Tensor,  # (P,) int32
    mean: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(P, D) sums or means of rows starts[p] to ends[p], accumulated in fp32.

    Two more launches add up segments of more than `PART_ROWS` rows, and return at once where there
    is none.
    """
    (total, width), count = x.shape, starts.shape[0]
    out = torch.empty((count, width), dtype=dtype, device=x.device)
    config = configs.segment_sum_config(total, width, x.dtype, x.device)
    long = configs.segment_sum_long_config(total, width, x.dtype, x.device)
    part_rows = long.pop("PART_ROWS")
    x, starts, ends = x.contiguous(), starts.contiguous(), ends.contiguous()
    may_be_long = total > part_rows and count > 0
    at = notes_for(total, part_rows, x.device) if may_be_long else starts
    chunks = _launch.ceil_div(count, config["BLOCK_P"])
    _launch.launch(
        stlm_segment_sum, chunks * _launch.ceil_div(width, config["BLOCK_D"]),
        x, starts, ends, out, at, count, total, chunks, part_rows,
        D=width, MEAN=mean, device=x.device, **config,
    )  # fmt: skip
    if may_be_long:
        parts = at.shape[0] - 1
        partial = torch.empty((parts, 2, width), dtype=torch.float32, device=x.device)
        _launch.launch(
            stlm_segment_sum_long, parts,
            x, at, starts, ends, partial, count, total, part_rows,
            D=width, STORED=dot_type(dtype), device=x.device, **long,
        )  # fmt: skip
        add_long_segments(partial, out, at, starts, ends, total, part_rows, mean)
    return out


@triton.jit
def logits_tile(
    h_ptr, w_ptr, bias_ptr, rows, live, columns, valid, scale, cap,
    D: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(columns, rows) logits after scale and cap; columns that do not exist are -inf."""
    in_vocab = columns < valid
    acc = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        w_mask = in_vocab[:, None] & (d < D)[None, :]
        w = tl.load(w_ptr + columns.to(tl.int64)[:, None] * D + d[None, :], mask=w_mask, other=0.0)
        h_mask = (d < D)[:, None] & live[None, :]
        h = tl.load(h_ptr + rows[None, :] * D + d[:, None], mask=h_mask, other=0.0)
        acc = tl.dot(w.to(DOT), h.to(DOT), acc, input_precision="ieee")
    return finished_logits(acc, bias_ptr, columns, valid, scale, cap, HAS_BIAS)


@triton.jit
def capped(z, cap):
    """cap * tanh(z / cap), by what the interpreter knows as well."""
    t = z / cap
    square = t * t
    # tanh's series where a difference has few digits
    series = t * (1.0 - square * (0.33333334 - square * (0.13333334 - square * 0.053968254)))
    return cap * tl.where(square < 0.015625, series, 2.0 * tl.sigmoid(2.0 * t) - 1.0)


@triton.jit
def finished_logits(acc, bias_ptr, columns, valid, scale, cap, HAS_BIAS: tl.constexpr):
    """(columns, rows) products with bias, scale and cap; columns that do not exist are -inf."""
    in_vocab = columns < valid
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=in_vocab, other=0.0).to(tl.float32)[:, None]
    z = acc * scale
    if cap > 0:
        z = capped(z, cap)
    return tl.where(in_vocab[:, None], z, float("-inf"))


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The products' operands; the interpreter computes 16-bit ones wrongly or not at all."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


@triton.jit(do_not_specialize=["n_segments", "total", "others", "before", "behind"])
def stlm_row_bounds(
    cu_ptr, other_ptr, bounds_ptr, n_segments, total, others, before, behind,
    MIRROR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Range of another stream's rows in each row's segment, cut to `before` and `behind` its place;
    the last rows of a segment stand side by side. Empty where there are none; both ends rise with
    the rows even so. MIRROR: also the range with the sides exchanged."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK
    rows = first_row + tl.arange(0, BLOCK)
    segments = segments_of(cu_ptr, first_row, n_segments, BLOCK).to(tl.int64)
    inside = (rows < total) & (segments >= 0) & (segments < n_segments)
    known = (tl.zeros((BLOCK,), tl.int32) + n_segments) > 0
    segments = tl.minimum(tl.maximum(segments, 0), n_segments - 1)  # rows behind all: the last
    start, end = segment_bounds(cu_ptr, segments, known, total)
    inside = inside & (rows >= start) & (rows < end)
    first, last = segment_bounds(other_ptr, segments, known, others)
    place = rows + last - end
    for turn in tl.static_range(1 + MIRROR):
        start = tl.minimum(tl.maximum(place - (behind if turn else before), first), last)
        end = tl.minimum(tl.maximum(place + (before if turn else behind) + 1, first), last)
        start, end = tl.where(inside, start, last), tl.where(inside, end, last)
        at = bounds_ptr + 2 * turn * total.to(tl.int64) + rows
        tl.store(at, start.to(tl.int32), mask=rows < total)
        tl.store(at + total, end.to(tl.int32), mask=rows < total)


def row_bounds(
    cu: Tensor,  # (n+1,) int32
    total: int,
    before: int,
    behind: int,
    other: Tensor,  # (n+1,) int32
    others: int,
    *,
    mirror: bool = False,
) -> Tensor:
    """(2, total) int32: what each row meets in its segment of `others` rows, at most `before` rows
    before its own place and `behind` rows behind it. (4, total) with `mirror`: then the same with
    the sides exchanged, which is what meets each row where both streams are one."""
    bounds = torch.empty((4 if mirror else 2, total), dtype=torch.int32, device=cu.device)
    segments = cu.shape[0] - 1
    config = configs.row_bounds_config(total, cu.device)
    _launch.launch(
        stlm_row_bounds, _launch.ceil_div(total, config["BLOCK"]),
        cu.contiguous(), other.contiguous(), bounds, segments, total, others, before, behind,
        MIRROR=mirror, device=cu.device, **config,
    )  # fmt: skip
    return bounds


@triton.jit
def tile(
    x_ptr, rows, live, stride, column, COLUMNS: tl.constexpr, DOT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(rows, WIDTH) from `column` on as a product's operand; zeros where nothing may be read."""
    d = tl.arange(0, WIDTH)
    place = x_ptr + rows[:, None] * stride + column + d[None, :]
    return tl.load(place, mask=live[:, None] & (d < COLUMNS)[None, :], other=0.0).to(DOT)


@triton.jit
def put(x_ptr, x, rows, live, stride, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The way back."""
    d = tl.arange(0, WIDTH)
    place = x_ptr + rows[:, None] * stride + column + d[None, :]
    tl.store(place, x.to(x_ptr.dtype.element_ty), mask=live[:, None] & (d < COLUMNS)[None, :])


@triton.jit
def harmless(x):
    """Rows that hold a NaN or an infinity zeroed, and NaN for each of them, 0 for the others."""
    poison = tl.sum(x.to(tl.float32) * 0.0, 1)
    return tl.where((poison == 0.0)[:, None], x, 0.0).to(x.dtype), poison


def with_rows(x: Tensor) -> Tensor:
    """(T, H, K) with dense rows: slices of packed projections stay, other layouts are copied."""
    if x.is_contiguous():
        return x
    dense = (
        x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) >= x.shape[1] * x.shape[2]
    )
    return x if dense else x.contiguous()
