"""The forward of byte_pool as a product of counts and table: out = diag(s) C E, C the counts.

A program holds BLOCK_D columns of the first 256 rows of the table in shared memory while it walks
its tiles of BLOCK_P patches. It counts the bytes of a tile, 32 slots of each patch at a time, in
registers as the product takes them (`_triton/counts.py`). Counts and 16-bit tables are exact, sums
fp32. Half of the table that no byte of a tile hits is skipped, so ASCII takes half the product;
rows from 256 on are read where a byte hits them. A patch of more than LONG bytes would have its
neighbours wait: it takes a tile of its own, a row for each 32 bytes, whose sum it is. One of more
than PART_ROWS is cut into parts that are summed likewise, see `_triton/long_segments.py`.

0 x NaN is NaN: where the columns hold one, or an infinity, the program takes the rows one by one.

Floor: T + 4P + 2PD bytes, at 1M bytes, mean patch 6, D = 768: 271 MB = 63 us at 4.3 TB/s, D = 128:
11 us; 2 P V D FLOP of products, half of that in ASCII. As bench.bounds counts it for an H200, not
timed: 10 us for English words (11 with 257 rows and checks of ids) and 12 to 16 for patches of 6
bytes at D = 128, 53 and 70 to 95 at D = 768. Row by row it was 61 and 64, 328 and 357, rows
counted as read from L2. Of D = 768, most is counting the bytes for each 128 columns; for 256 at a
time it was 50 and 69 to 73, but spilled.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.config import part_rows_for
from ..._triton.counts import (
    SLOTS,
    counts_by_patch,
    planes_of,
    reach_of,
    slots_inside,
    slots_with,
    whole_words,
    window_of,
)
from ..._triton.long_segments import add_long_segments, long_rows, note_long, notes_for
from ..._triton.tiles import INTERPRETED, dot_type
from . import config as configs
from .triton_impl import launch_gather, patch_ends, pool_patches, sum_of_bytes

HALF = tl.constexpr(128)
MAIN = tl.constexpr(256)


@triton.jit
def _rows_of(
    weight_ptr, first, columns, vocab, ROWS: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """(ROWS, columns) of the table from row `first` on, zeros where there is none."""
    rows = first + tl.arange(0, ROWS)
    mask = (rows < vocab)[:, None] & (columns < D)[None, :]
    place = weight_ptr + (rows.to(tl.int64)[:, None] * D + columns[None, :])
    return tl.load(place, mask=mask, other=0.0).to(DOT)


@triton.jit
def _is_finite(
    weight_ptr, low_table, high_table, columns, vocab,
    D: tl.constexpr, DOT: tl.constexpr, REST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return whether all numbers of these columns of the table are finite."""
    nothing = tl.dot(tl.zeros((BLOCK_P, HALF), DOT), low_table)
    nothing = tl.dot(tl.zeros((BLOCK_P, HALF), DOT), high_table, nothing)
    if REST > 0:
        for first in range(MAIN, vocab, REST):
            rows = _rows_of(weight_ptr, first, columns, vocab, REST, D, DOT)
            nothing = tl.dot(tl.zeros((BLOCK_P, REST), DOT), rows, nothing)
    return tl.sum(nothing) == 0


@triton.jit
def _add_rest(
    acc, missing, ids_ptr, weight_ptr, window, start, end, columns, vocab,
    D: tl.constexpr, DOT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Add the rows from MAIN on, REST at a time; also return the slots still missing."""
    BITS: tl.constexpr = REST.bit_length() - 5
    for first in range(MAIN, vocab, REST):
        rows = tl.minimum(vocab - first, REST)
        planes = planes_of(ids_ptr, window, start, end, first, rows, True)
        first_bits, last_bits = slots_with(planes, 4, BITS, 0), slots_with(planes, 0, 4, 0)
        counts = counts_by_patch(first_bits, last_bits, planes[0], DOT)
        acc = tl.dot(counts, _rows_of(weight_ptr, first, columns, vocab, REST, D, DOT), acc)
        missing ^= planes[0]
    return acc, missing


@triton.jit
def _product(
    ids_ptr, weight_ptr, low_table, high_table, start, end, columns, vocab,
    D: tl.constexpr, DOT: tl.constexpr, CHECKED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """(patches, columns) sums of the rows of bytes from `start` to `end`; NaN of a bad id."""
    acc = tl.zeros((start.shape[0], columns.shape[0]), tl.float32)
    bad = tl.zeros(start.shape, tl.int32)
    # Rarely more than once: copies for a next time would cost more than they save.
    for slot in tl.range(0, tl.max(reach_of(start, end)), SLOTS, num_stages=1):
        window = window_of(start) + slot
        planes = planes_of(ids_ptr, window, start, end, 0, tl.minimum(vocab, MAIN), CHECKED)
        last_bits = slots_with(planes, 0, 4, 0)
        first_bits = slots_with(planes, 4, 3, 0)
        upper = planes[0] & planes[8]
        counts = counts_by_patch(first_bits, last_bits, planes[0] ^ upper, DOT)
        acc = tl.dot(counts, low_table, acc)
        if tl.max((upper != 0).to(tl.int32)) > 0:
            counts = counts_by_patch(first_bits, last_bits, upper, DOT)
            acc = tl.dot(counts, high_table, acc)
        if CHECKED:
            missing = slots_inside(ids_ptr, window, start, end) ^ planes[0]
            if REST > 0 and tl.max((missing != 0).to(tl.int32)) > 0:
                acc, missing = _add_rest(
                    acc, missing, ids_ptr, weight_ptr, window, start, end, columns, vocab,
                    D, DOT, REST,
                )  # fmt: skip
            bad |= missing
    if CHECKED:
        acc = tl.where((bad != 0)[:, None], float("nan"), acc)
    return acc


@triton.jit
def _shared_out(start, end, ROWS: tl.constexpr):
    """(ROWS,) start and end of equal shares of a run, SLOTS bytes each or a multiple."""
    window = window_of(start)
    share = tl.cdiv(tl.maximum(end - window, 1), SLOTS * ROWS) * SLOTS
    first = window + share * tl.arange(0, ROWS)
    return tl.maximum(first, start), tl.minimum(first + share, end)


@triton.jit
def _pool_tile(
    ids_ptr, weight_ptr, cu_ptr, at_ptr, out_ptr, low_table, high_table, first, columns,
    total, n_patches, vocab, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr, CHECKED: tl.constexpr, REST: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Pool the patches from `first` on together, then those of more than LONG bytes one by one."""
    DOT: tl.constexpr = out_ptr.dtype.element_ty
    local, patches = tl.arange(0, BLOCK_P), first + tl.arange(0, BLOCK_P)
    own = patches < n_patches
    start, end, scale = patch_ends(cu_ptr, patches, own, total, MEAN)
    is_long = end - start > tl.minimum(part_rows, LONG)
    one = tl.full((), -1, tl.int32)
    while one < BLOCK_P:
        begin, stop = start, tl.where(is_long, start, end)
        if one >= 0:
            note_long(at_ptr, patches, start, end, part_rows)
            begins = tl.max(tl.where(local == one, start, 0))
            ends = tl.max(tl.where(local == one, end, 0))
            # One that is longer than a part gets its sum from programs of their own.
            ends = tl.where(ends - begins > part_rows, begins, ends)
            begin, stop = _shared_out(begins, ends, BLOCK_P)
        acc = _product(
            ids_ptr, weight_ptr, low_table, high_table, begin, stop, columns, vocab,
            D, DOT, CHECKED, REST,
        )  # fmt: skip
        out = out_ptr + first.to(tl.int64) * D
        if one < 0:
            mask = (own & ~is_long)[:, None] & (columns < D)[None, :]
            acc *= scale[:, None]
            tl.store(out + (local[:, None] * D + columns[None, :]), acc.to(DOT), mask=mask)
        else:
            factor = tl.max(tl.where(local == one, scale, 0.0))
            tl.store(out + one * D + columns, (tl.sum(acc, 0) * factor).to(DOT), mask=columns < D)
        one = tl.min(tl.where(is_long & (local > one), local, BLOCK_P))


@triton.jit(do_not_specialize=["total", "n_patches", "shares", "part_rows"])
def stlm_byte_pool_fwd_product(
    ids_ptr, weight_ptr, cu_ptr, at_ptr, out_ptr,
    total, n_patches, vocab, shares, part_rows,
    D: tl.constexpr, MEAN: tl.constexpr, CHECKED: tl.constexpr, REST: tl.constexpr,
    LONG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DOT: tl.constexpr = out_ptr.dtype.element_ty
    begin, block = (tl.program_id(0) % shares) * BLOCK_P, tl.program_id(0) // shares
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    low_table = _rows_of(weight_ptr, 0, columns, vocab, HALF, D, DOT)
    high_table = _rows_of(weight_ptr, HALF, columns, vocab, HALF, D, DOT)
    if _is_finite(weight_ptr, low_table, high_table, columns, vocab, D, DOT, REST, BLOCK_P):
        for step in range(0, n_patches - begin, shares * BLOCK_P):
            first = begin + step
            _pool_tile(
                ids_ptr, weight_ptr, cu_ptr, at_ptr, out_ptr, low_table, high_table, first, columns,
                total, n_patches, vocab, part_rows, D, MEAN, CHECKED, REST, LONG, BLOCK_P,
            )  # fmt: skip
    else:
        for step in range(0, n_patches - begin, shares * BLOCK_P):
            first = begin + step
            pool_patches(
                ids_ptr, weight_ptr, cu_ptr, weight_ptr, at_ptr, out_ptr,
                first, tl.minimum(first + BLOCK_P, n_patches), block,
                total, vocab, 1, part_rows, D, MEAN, False, CHECKED, BLOCK_D,
            )  # fmt: skip


@triton.jit(do_not_specialize=["total", "n_patches", "parts", "part_rows"])
def stlm_byte_pool_fwd_product_long(
    ids_ptr, weight_ptr, cu_ptr, at_ptr, partial_ptr,
    total, n_patches, vocab, parts, part_rows,
    D: tl.constexpr, DOT: tl.constexpr, CHECKED: tl.constexpr, REST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the bytes of long patches in each part."""
    part, block = (tl.program_id(0) % parts).to(tl.int64), tl.program_id(0) // parts
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    ends = cu_ptr + 1
    start, end, patch = long_rows(at_ptr, cu_ptr, ends, part, n_patches, total, part_rows, 0)
    begin, stop, other = long_rows(at_ptr, cu_ptr, ends, part, n_patches, total, part_rows, 1)
    if (end > start) | (stop > begin):
        low_table = _rows_of(weight_ptr, 0, columns, vocab, HALF, D, DOT)
        high_table = _rows_of(weight_ptr, HALF, columns, vocab, HALF, D, DOT)
        finite = _is_finite(
            weight_ptr, low_table, high_table, columns, vocab, D, DOT, REST, BLOCK_P
        )  # fmt: skip
        for side in range(2):
            first = (start + side * (begin - start)).to(tl.int32)
            last = (end + side * (stop - end)).to(tl.int32)
            owner = (patch + side * (other - patch)).to(tl.int32)
            if finite:
                firsts, lasts = _shared_out(first, last, BLOCK_P)
                acc = _product(
                    ids_ptr, weight_ptr, low_table, high_table, firsts, lasts, columns, vocab,
                    D, DOT, CHECKED, REST,
                )  # fmt: skip
                y = tl.sum(acc, 0)
            else:
                y = sum_of_bytes(
                    ids_ptr, weight_ptr, weight_ptr, owner, first, last, block, vocab, 1,
                    D, False, CHECKED, DOT, BLOCK_D,
                )  # fmt: skip
            tl.store(partial_ptr + (2 * part + side) * D + columns, y, mask=columns < D)


def launch_fwd(
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    position_weight: Tensor | None,  # (L, D)
    mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    (vocab, width), device = weight.shape, weight.device
    wrong = INTERPRETED and out_dtype == torch.bfloat16  # as the interpreter makes products
    product = not wrong and configs.takes_product(vocab, out_dtype, device)
    if position_weight is not None or not product:
        return launch_gather(byte_ids, weight, cu_patchlens, position_weight, mean, out_dtype)
    patches, total = cu_patchlens.shape[0] - 1, min(byte_ids.shape[0], 2**31 - 1)
    out = torch.empty((patches, width), dtype=out_dtype, device=device)
    checked = byte_ids.dtype != torch.uint8 or vocab < 256
    config = configs.product_config(width, checked, out_dtype, device)
    programs, part_rows = config.pop("PROGRAMS"), part_rows_for(total, config.pop("PART_ROWS"))
    blocks = _launch.ceil_div(width, config["BLOCK_D"])
    shares, _ = _launch.splits(patches, blocks, programs, config["BLOCK_P"])
    rest = configs.REST_ROWS if checked and vocab > 256 else 0
    cu = cu_patchlens.contiguous()
    may_be_long = total > part_rows and patches > 0
    at = notes_for(total, part_rows, device) if may_be_long else cu
    arguments = (whole_words(byte_ids), weight.contiguous(), cu, at)
    constants: dict[str, Any] = {
        "D": width,
        "CHECKED": checked,
        "REST": rest,
        "device": device,
        **config,
    }
    _launch.launch(
        stlm_byte_pool_fwd_product, shares * blocks, *arguments, out,
        total, patches, vocab, shares, part_rows, MEAN=mean, LONG=configs.ALONE, **constants,
    )  # fmt: skip
    if may_be_long:
        parts = at.shape[0] - 1
        partial = torch.empty((parts, 2, width), dtype=torch.float32, device=device)
        _launch.launch(
            stlm_byte_pool_fwd_product_long, parts * blocks, *arguments, partial,
            total, patches, vocab, parts, part_rows, DOT=dot_type(out_dtype), **constants,
        )  # fmt: skip
        add_long_segments(partial, out, at, cu[:-1], cu[1:], total, part_rows, mean)
    return out
