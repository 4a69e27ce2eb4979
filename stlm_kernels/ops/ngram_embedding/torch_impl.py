"""ngram_embedding in aten ops: the CPU path, and every case that the kernels do not take.

The hash of n bytes is one step on from that of n - 1: h_n(t) = h_{n-1}(t) * m + id[t - n + 1],
so all tables of one multiplier m share one walk back over the bytes.
Forward: one index_select for each table. Backward: index_add of float32 rows, in order, which on a
CPU is about as fast as summing sorted runs and faster than F.embedding's own backward, and needs no
sort; on a GPU index_put, which sorts and needs no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd, segments
from ..._torch.function import Function


def ngram_embedding(
    byte_ids: Tensor,  # (T,)
    tables: Sequence[Tensor],  # (M_i, D)
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int],
    cu_seqlens: Tensor | None,  # (S+1,) int32
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    total = byte_ids.shape[0]
    visible = (byte_ids,) if cu_seqlens is None else (byte_ids, cu_seqlens)
    if runtime.values_visible(*visible):
        last = total if cu_seqlens is None else int(cu_seqlens[-1])
        ids = byte_ids[:last].long()
        begins = _begins(cu_seqlens, max(ngram_sizes))
        rows = _table_rows(ids, tables, ngram_sizes, multipliers, begins)
        out = _look_up(rows, tables, out_dtype)
        return out if last == total else F.pad(out, (0, 0, 0, total - last))
    ids, live = byte_ids.long(), torch.ones_like(byte_ids, dtype=torch.bool)
    if cu_seqlens is not None:
        cu_seqlens = segments.clamped_bounds(cu_seqlens, total)
        positions = torch.arange(total, device=byte_ids.device)
        live = (positions >= cu_seqlens[0]) & (positions < cu_seqlens[-1])
    begins = _begins(cu_seqlens, max(ngram_sizes))
    lowest = ids
    for back in range(1, max(ngram_sizes)):
        lowest = torch.minimum(lowest, _earlier(ids, begins, back))
    rows = _table_rows(ids, tables, ngram_sizes, multipliers, begins)
    out = _look_up(rows, tables, out_dtype)
    filling = torch.where(live & (lowest < 0), float("nan"), 0.0).to(out_dtype)
    return torch.where((live & (lowest >= 0))[:, None], out, filling[:, None])


def _begins(cu_seqlens: Tensor | None, longest: int) -> Tensor | None:
    """(longest - 1, S) positions: row k holds the k-th byte of each document, were it so long."""
    if cu_seqlens is None:
        return None
    steps = torch.arange(longest - 1, device=cu_seqlens.device)
    return steps[:, None] + cu_seqlens[:-1]


def _earlier(ids: Tensor, begins: Tensor | None, back: int) -> Tensor:
    """The id `back` bytes before each byte, 0 before its document."""
    total, earlier = ids.shape[0], F.pad(ids, (back, 0))
    if begins is not None:  # what lies beyond the end falls on a position that is cut off
        earlier = earlier.index_fill(0, begins[:back].flatten().clamp(max=total), 0)
    return earlier[:total]


def _table_rows(
    ids: Tensor,  # (T,) int64
    tables: Sequence[Tensor],
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int],
    begins: Tensor | None,
) -> Tensor:  # (tables, T)
    """The row that each byte reads in each table."""
    calls, rows = list(zip(ngram_sizes, multipliers, strict=True)), [ids] * len(ngram_sizes)
    hashes = dict.fromkeys(multipliers, ids)
    for back in range(max(ngram_sizes)):
        if back:
            earlier = _earlier(ids, begins, back)
            going = dict.fromkeys(m for n, m in calls if n > back)
            hashes = {m: torch.add(earlier, hashes[m], alpha=m) for m in going}
        for i, (n, m) in enumerate(calls):
            if n == back + 1:
                rows[i] = _floor_mod(hashes[m], tables[i].shape[0])
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _floor_mod(value: Tensor, divisor: int) -> Tensor:
    if divisor & (divisor - 1) == 0:  # a fraction of the time of a division
        return value & (divisor - 1)
    return value.remainder(divisor)


def _look_up(rows: Tensor, tables: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    needs_grad = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
    if runtime.carries_tangents(*tables):
        return _read(rows, tables, out_dtype)
    if needs_grad or runtime.inside_torch_func():
        return _LookUp.apply(rows, out_dtype, *tables)
    return _read(rows, tables, out_dtype)


def _read(rows: Tensor, tables: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    out = tables[0].index_select(0, rows[0]).to(out_dtype)
    if len(tables) == 1:
        return out
    out = out.to(torch.promote_types(out_dtype, torch.float32))
    for table, indices in zip(tables[1:], rows[1:], strict=True):
        row = table.index_select(0, indices).to(out_dtype)
        # vmap refuses to add what is batched in place
        out = out + row if runtime.inside_torch_func() else out.add_(row)
    return out.to(out_dtype)


class _LookUp(Function):
    """The sum of the tables' rows; gradients accumulate in float32 and are cast once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, out_dtype: torch.dtype, *tables: Tensor) -> Tensor:
        return autograd.as_output(_read(rows, tables, out_dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, _, *tables = inputs
        ctx.save_for_backward(rows)
        ctx.tables = [(table.shape[0], table.dtype) for table in tables]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        grad = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        wanted = ctx.needs_input_grad[2:]
        sums = [
            _sums_by_row(grad, rows[i], size).to(dtype) if wanted[i] else None
            for i, (size, dtype) in enumerate(ctx.tables)
        ]
        return None, None, *sums


def _sums_by_row(grad: Tensor, rows: Tensor, size: int) -> Tensor:
    sums = grad.new_zeros(size, grad.shape[1])
    if grad.is_cuda:
        return sums.index_put_((rows,), grad, accumulate=True)
    return sums.index_add_(0, rows, grad)
