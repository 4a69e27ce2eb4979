"""unpool in Triton: a gather by rows forward, a contiguous segment sum backward.

Forward. A program owns BLOCK_T rows: patch state or null state, plus the residual, cast once.
Floor (bf16): 2 (T + P) D bytes, 4 T D more with a residual; 291 us at 1M bytes, D = 512, bare.
Backward. Each id >= 0 occupies one run of rows: one pass over the ids notes where each run begins
and ends, then the shared segment sum adds its rows in order. The null state's gradient adds the
rows that read nothing, in runs that are added in a fixed order. No atomics, nothing of size T x D
beyond the upstream gradient. The pass over the ids moves 1.2 of the fewest sectors: ids before a
thread's own begin off the alignment of a sector, and runs begin anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, segment_sum, side_by_side, sum_splits
from . import config as configs


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_unpool_fwd(
    states_ptr, ids_ptr, null_ptr, residual_ptr, out_ptr,
    n_patches, total,
    D: tl.constexpr, CAST: tl.constexpr, HAS_NULL: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ids = tl.load(ids_ptr + rows, mask=rows < total, other=-1).to(tl.int64)
    reads = (ids >= 0) & (ids < n_patches)
    bad = (ids < -1) | (ids >= n_patches)
    stored = out_ptr.dtype.element_ty
    for first in range(0, D, BLOCK_D):
        if states_ptr.dtype.element_ty == tl.float32:
            columns = first + side_by_side(BLOCK_D, 4)
        else:
            columns = first + tl.arange(0, BLOCK_D)
        in_width = columns < D
        source = states_ptr + ids[:, None] * D + columns[None, :]
        out = tl.load(source, mask=reads[:, None] & in_width[None, :], other=0.0)
        out = out.to(CAST).to(tl.float32)
        if HAS_NULL:
            null = tl.load(null_ptr + columns, mask=in_width, other=0.0).to(stored).to(tl.float32)
            out = tl.where((ids == -1)[:, None], null[None, :], out)
        place = rows[:, None] * D + columns[None, :]
        mask = (rows < total)[:, None] & in_width[None, :]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
            out += residual.to(stored).to(tl.float32)
        out = tl.where(bad[:, None], float("nan"), out)
        tl.store(out_ptr + place, out.to(stored), mask=mask)


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_unpool_runs(ids_ptr, runs_ptr, n_patches, total, BLOCK: tl.constexpr):
    """runs[0, j] and runs[1, j]: where id j begins and where it has ended, at a row up to `total`.

    No row reads before the first or behind the last.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(ids_ptr + rows, mask=rows < total, other=-1).to(tl.int64)
    before = tl.load(ids_ptr + rows - 1, mask=(rows > 0) & (rows <= total), other=-1).to(tl.int64)
    changes = here != before
    begins = changes & (here >= 0) & (here < n_patches)
    ends = changes & (before >= 0) & (before < n_patches)
    tl.store(runs_ptr + here, rows.to(tl.int32), mask=begins)
    tl.store(runs_ptr + n_patches + before, rows.to(tl.int32), mask=ends)


@triton.jit(do_not_specialize=["total", "run"])
def stlm_unpool_bwd_null(
    grad_ptr, ids_ptr, partial_ptr,
    total, run,
    D: tl.constexpr, SCAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scan SCAN ids at a time; add the rows from the first that reads nothing to the last."""
    program = tl.program_id(0).to(tl.int64)
    split = program // tl.cdiv(D, BLOCK_D)
    columns = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.minimum((split + 1) * run, total)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(split * run, end, SCAN):
        seen = first + tl.arange(0, SCAN)
        null = tl.load(ids_ptr + seen, mask=seen < end, other=0).to(tl.int64) == -1
        behind = tl.max(tl.where(null, seen + 1, 0), 0)
        for row in range(tl.min(tl.where(null, seen, end), 0), behind, BLOCK_T):
            rows = row + tl.arange(0, BLOCK_T)
            ids = tl.load(ids_ptr + rows, mask=rows < behind, other=0).to(tl.int64)
            mask = (ids == -1)[:, None] & (columns < D)[None, :]
            grad = tl.load(grad_ptr + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
            acc += grad.to(tl.float32)
    tl.store(partial_ptr + split * D + columns, tl.sum(acc, 0), mask=columns < D)


def launch_fwd(
    patch_states: Tensor,  # (P, D)
    read_ids: Tensor,  # (T,)
    null_state: Tensor | None,  # (D,)
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
    states_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return (T, D) in `out_dtype`, of patch states cast to `states_dtype` (None: the same)."""
    (patches, width), total = patch_states.shape, read_ids.shape[0]
    out = torch.empty((total, width), dtype=out_dtype, device=patch_states.device)
    config = configs.fwd_config(total, width, out_dtype, patch_states.device)
    states = patch_states.contiguous()
    _launch.launch(
        stlm_unpool_fwd, _launch.ceil_div(total, config["BLOCK_T"]),
        states, read_ids.contiguous(),
        states if null_state is None else null_state.contiguous(),
        states if residual is None else residual.contiguous(),
        out, patches, total,
        D=width, CAST=dot_type(states_dtype or out_dtype),
        HAS_NULL=null_state is not None, HAS_RESIDUAL=residual is not None,
        device=states.device, **config,
    )  # fmt: skip
    return out


def launch_bwd(grad: Tensor, read_ids: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
    """(P, D) gradient of the patch states; ids that no row reads get zeros."""
    runs = torch.zeros((2, patches), dtype=torch.int32, device=grad.device)
    total = read_ids.shape[0]
    config = configs.runs_config(total, grad.device)
    _launch.launch(
        stlm_unpool_runs, _launch.ceil_div(total + 1, config["BLOCK"]),
        read_ids.contiguous(), runs, patches, total, device=grad.device, **config,
    )  # fmt: skip
    return segment_sum(grad, runs[0], runs[1], False, dtype)


def launch_bwd_null(grad: Tensor, read_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(D,) gradient of the null state."""
    total, width = grad.shape
    config = configs.bwd_null_config(total, width, grad.dtype, grad.device)
    tiles = _launch.ceil_div(width, config["BLOCK_D"])
    splits, run = _launch.splits(total, tiles, config.pop("PROGRAMS"), config["SCAN"])
    partial = torch.empty((splits, width), dtype=torch.float32, device=grad.device)
    _launch.launch(
        stlm_unpool_bwd_null, splits * tiles,
        grad.contiguous(), read_ids.contiguous(), partial, total, run,
        D=width, device=grad.device, **config,
    )  # fmt: skip
    return sum_splits(partial, dtype)
