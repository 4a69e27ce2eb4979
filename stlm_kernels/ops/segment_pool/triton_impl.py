"""segment_pool in Triton.

Forward. Sum and mean are the shared segment sum. Maximum, minimum, first and last pick one row
for each patch and column: a program owns BLOCK_P patches x BLOCK_D columns and walks their rows
together; the row of the maximum or minimum is kept for the backward. Patches of more than 512 rows
are cut into parts (`_triton/long_segments.py`), of which each notes the row of its best.
Backward. By rows: a program owns BLOCK_T rows, finds their patches by bisection and writes every
column of dx, zeros where a row takes nothing, so that nothing is filled beforehand.

Floor: (T + P) D elements each way, 2 bytes in bf16: 437 us at 1M bytes, mean patch 6, D = 768,
4.3 TB/s; the maximum and the minimum add 4 P D bytes for their rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.config import part_rows_for
from ..._triton.long_segments import begins_long, long_rows, note_long, notes_for, part_places
from ..._triton.tiles import dot_type, segment_bounds, segment_sum, segments_of
from . import config as configs

MEAN, SUM, MAX, FIRST, LAST, MIN = (tl.constexpr(i) for i in range(6))
NOWHERE = tl.constexpr(2**31 - 1)
MODE_CODES = {"mean": 0, "sum": 1, "max": 2, "first": 3, "last": 4, "min": 5}


@triton.jit
def _better(best, row, x, here, mask, MODE: tl.constexpr):
    """Take x from row `here` where it is better; the first of equals stays, and the first NaN."""
    beyond = x < best if MODE == MIN else x > best
    better = mask & (best == best) & (beyond | (x != x))
    return tl.where(better, x, best), tl.where(better, here, row)


@triton.jit
def _first_best(best, row, MODE: tl.constexpr):
    """(D,) row of the first NaN of a column, else of the first of its best; rows of -1 are none."""
    row = tl.where(row < 0, NOWHERE, row)
    is_nan = best != best
    nan_row = tl.min(tl.where(is_nan, row, NOWHERE), 0)
    if MODE == MIN:
        most = tl.min(tl.where(is_nan | (row == NOWHERE), float("inf"), best), 0)
    else:
        most = tl.max(tl.where(is_nan | (row == NOWHERE), float("-inf"), best), 0)
    most_row = tl.min(tl.where(best == most[None, :], row, NOWHERE), 0)
    return tl.where(nan_row < NOWHERE, nan_row, most_row)


@triton.jit(do_not_specialize=["n_patches", "total", "chunks", "part_rows"])
def stlm_segment_pool_pick(
    x_ptr, cu_ptr, out_ptr, row_ptr, at_ptr,
    n_patches, total, chunks, part_rows,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = (program // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    patches = (program % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    start, end = segment_bounds(cu_ptr, patches, patches < n_patches, total)
    stored = out_ptr.dtype.element_ty
    filled = (end > start)[:, None] & (columns < D)[None, :]
    picked = end - 1 if MODE == LAST else start
    best = tl.load(x_ptr + picked[:, None] * D + columns[None, :], mask=filled, other=0.0)
    best = best.to(stored).to(tl.float32)
    if (MODE == MAX) | (MODE == MIN):
        row = tl.zeros((BLOCK_P, BLOCK_D), tl.int32) + start.to(tl.int32)[:, None]
        longest = tl.max(end - start).to(tl.int32)
        if longest > part_rows:
            note_long(at_ptr, patches, start, end, part_rows)
            end = tl.where(end - start > part_rows, start, end)
            longest = part_rows.to(tl.int32)
        for slot in range(1, longest):
            here = start + slot
            mask = (here < end)[:, None] & (columns < D)[None, :]
            x = tl.load(x_ptr + here[:, None] * D + columns[None, :], mask=mask, other=0.0)
            x = x.to(stored).to(tl.float32)
            best, row = _better(best, row, x, here.to(tl.int32)[:, None], mask, MODE)
        rows_mask = (patches < n_patches)[:, None] & (columns < D)[None, :]
        out_row = tl.where(filled, row, -1)
        tl.store(row_ptr + patches[:, None] * D + columns[None, :], out_row, mask=rows_mask)
    mask = (patches < n_patches)[:, None] & (columns < D)[None, :]
    tl.store(out_ptr + patches[:, None] * D + columns[None, :], best.to(stored), mask=mask)


@triton.jit(do_not_specialize=["n_patches", "total", "part_rows"])
def stlm_segment_pool_pick_long(
    x_ptr, at_ptr, cu_ptr, part_row_ptr,
    n_patches, total, part_rows,
    D: tl.constexpr, MODE: tl.constexpr, STORED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Note the row of the best of each part of a long patch, see `_triton/long_segments.py`."""
    part = tl.program_id(0).to(tl.int64)
    for side in tl.static_range(2):
        first, end, _ = long_rows(
            at_ptr, cu_ptr, cu_ptr + 1, part, n_patches, total, part_rows, side
        )
        if end > first:
            for column in range(0, D, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                best = tl.full((BLOCK_T, BLOCK_D), 0.0, tl.float32)
                row = tl.full((BLOCK_T, BLOCK_D), -1, tl.int32)
                for start in range(first, end, BLOCK_T):
                    rows = start + tl.arange(0, BLOCK_T)
                    mask = (rows < end)[:, None] & (columns < D)[None, :]
                    x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
                    x, rows = x.to(STORED).to(tl.float32), rows.to(tl.int32)[:, None]
                    unset = mask & (row < 0)
                    best, row = tl.where(unset, x, best), tl.where(unset, rows, row)
                    best, row = _better(best, row, x, rows, mask, MODE)
                place = part_row_ptr + (2 * part + side) * D + columns
                tl.store(place, _first_best(best, row, MODE), mask=columns < D)


@triton.jit(do_not_specialize=["n_patches", "total", "part_rows"])
def stlm_segment_pool_pick_parts(
    x_ptr, at_ptr, cu_ptr, part_row_ptr, out_ptr, row_ptr,
    n_patches, total, part_rows,
    D: tl.constexpr, MODE: tl.constexpr, STORED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The program of the part in which a long patch begins picks among the rows of its parts."""
    part = tl.program_id(0).to(tl.int64)
    patch, start, end = begins_long(at_ptr, cu_ptr, cu_ptr + 1, part, n_patches, total, part_rows)
    if end > start:
        for column in range(0, D, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            best = tl.full((BLOCK_S, BLOCK_D), 0.0, tl.float32)
            row = tl.full((BLOCK_S, BLOCK_D), -1, tl.int32)
            for here in range(part, tl.cdiv(end, part_rows), BLOCK_S):
                place = part_places(here + tl.arange(0, BLOCK_S), part, start, part_rows)
                parts = here + tl.arange(0, BLOCK_S)
                mask = (parts * part_rows < end)[:, None] & (columns < D)[None, :]
                cells = place[:, None] * D + columns[None, :]
                rows = tl.load(part_row_ptr + cells, mask=mask, other=0)
                x = tl.load(x_ptr + rows.to(tl.int64) * D + columns[None, :], mask=mask, other=0.0)
                x = x.to(STORED).to(tl.float32)
                unset = mask & (row < 0)
                best, row = tl.where(unset, x, best), tl.where(unset, rows, row)
                best, row = _better(best, row, x, rows, mask, MODE)
            row_of = _first_best(best, row, MODE)
            in_width = columns < D
            picked = tl.load(x_ptr + row_of.to(tl.int64) * D + columns, mask=in_width, other=0.0)
            place = patch * D + columns
            tl.store(out_ptr + place, picked.to(out_ptr.dtype.element_ty), mask=in_width)
            tl.store(row_ptr + place, row_of, mask=in_width)


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_segment_pool_bwd(
    grad_ptr, cu_ptr, row_ptr, dx_ptr,
    n_patches, total,
    D: tl.constexpr, MODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    rows = first_row + tl.arange(0, BLOCK_T)
    patches = segments_of(cu_ptr, first_row, n_patches, BLOCK_T).to(tl.int64)
    inside = (rows < total) & (patches >= 0) & (patches < n_patches)
    start, end = segment_bounds(cu_ptr, patches, inside, total)
    inside = inside & (rows >= start) & (rows < end)
    if MODE == FIRST:
        inside = inside & (rows == start)
    if MODE == LAST:
        inside = inside & (rows == end - 1)
    share = 1.0 / tl.maximum(end - start, 1).to(tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        source = patches[:, None] * D + columns[None, :]
        grad = tl.load(grad_ptr + source, mask=mask, other=0.0).to(tl.float32)
        if MODE == MEAN:
            grad *= share[:, None]
        if (MODE == MAX) | (MODE == MIN):
            winner = tl.load(row_ptr + source, mask=mask, other=-1)
            grad = tl.where(winner == rows[:, None], grad, 0.0)
        out = (rows < total)[:, None] & (columns < D)[None, :]
        dx = grad.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx, mask=out)


def launch_fwd(
    x: Tensor,  # (T, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    mode: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(P, D) pooled, and (P, D) int32 rows that hold the maxima or minima (else empty)."""
    (total, width), patches = x.shape, cu_patchlens.shape[0] - 1
    shape = (patches, width) if mode in ("max", "min") else 0
    rows = torch.empty(shape, dtype=torch.int32, device=x.device)
    if mode in ("mean", "sum"):
        starts, ends = cu_patchlens[:-1], cu_patchlens[1:]
        return segment_sum(x, starts, ends, mode == "mean", out_dtype), rows
    out = torch.empty((patches, width), dtype=out_dtype, device=x.device)
    config = configs.pick_config(total, width, x.dtype, x.device)
    part_rows = part_rows_for(total, config.pop("PART_ROWS"))
    chunks = _launch.ceil_div(patches, config["BLOCK_P"])
    x, cu = x.contiguous(), cu_patchlens.contiguous()
    may_be_long = mode in ("max", "min") and total > part_rows and patches > 0
    at = notes_for(total, part_rows, x.device) if may_be_long else cu
    _launch.launch(
        stlm_segment_pool_pick, chunks * _launch.ceil_div(width, config["BLOCK_D"]),
        x, cu, out, rows, at, patches, total, chunks, part_rows,
        D=width, MODE=MODE_CODES[mode], device=x.device, **config,
    )  # fmt: skip
    if may_be_long:
        _pick_long(x, at, cu, out, rows, mode, part_rows)
    return out, rows


def _pick_long(
    x: Tensor,  # (T, D)
    at: Tensor,  # (parts + 1,) int32
    cu: Tensor,  # (P+1,) int32
    out: Tensor,  # (P, D)
    rows: Tensor,  # (P, D) int32
    mode: str,
    part_rows: int,
) -> None:
    """Write maxima or minima of the patches of more than `part_rows` rows, and their rows."""
    (total, width), parts = x.shape, at.shape[0] - 1
    part_row = torch.empty((parts, 2, width), dtype=torch.int32, device=x.device)
    config = configs.pick_long_config(width, x.dtype, x.device)
    sums = {"BLOCK_S": config["BLOCK_T"]} | {k: v for k, v in config.items() if k != "BLOCK_T"}
    sizes = (cu.shape[0] - 1, total, part_rows)
    constants = {"D": width, "MODE": MODE_CODES[mode], "STORED": dot_type(out.dtype)}
    _launch.launch(
        stlm_segment_pool_pick_long, parts, x, at, cu, part_row, *sizes,
        device=x.device, **constants, **config,
    )  # fmt: skip
    _launch.launch(
        stlm_segment_pool_pick_parts, parts, x, at, cu, part_row, out, rows, *sizes,
        device=x.device, **constants, **sums,
    )  # fmt: skip


def launch_bwd(
    grad: Tensor,  # (P, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    rows: Tensor,  # (P, D) int32 or empty
    mode: str,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    """(T, D) gradient of x."""
    patches, width = grad.shape
    dx = torch.empty((total, width), dtype=dtype, device=grad.device)
    config = configs.bwd_config(total, width, dtype, grad.device)
    _launch.launch(
        stlm_segment_pool_bwd, _launch.ceil_div(total, config["BLOCK_T"]),
        grad.contiguous(), cu_patchlens.contiguous(), rows, dx,
        patches, total,
        D=width, MODE=MODE_CODES[mode], device=grad.device, **config,
    )  # fmt: skip
    return dx
