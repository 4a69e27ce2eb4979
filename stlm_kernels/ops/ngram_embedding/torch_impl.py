"""ngram_embedding in aten ops: the CPU path, and every case that the kernels do not take.

The hash of n bytes is one step on from that of n - 1: h_n(t) = h_{n-1}(t) * base + id[t - n + 1].
Forward: index_select, several tables in pieces of rows that stay in the cache. Backward: index_add
of float32 rows, in order, which on a CPU is as fast as summing sorted runs and several times as
fast as F.embedding's own backward; on a GPU index_put, which sorts and needs no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from .launch import HASH_BASE

PIECE = 2048


def ngram_embedding(
    byte_ids: Tensor,  # (T,)
    tables: Sequence[Tensor],  # (M_i, D)
    ns: Sequence[int],
    cu_seqlens: Tensor | None,  # (S+1,) int32
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    total = byte_ids.shape[0]
    visible = (byte_ids,) if cu_seqlens is None else (byte_ids, cu_seqlens)
    if _checks.values_visible(*visible):
        starts, last = None, total
        if cu_seqlens is not None:
            last = int(cu_seqlens[-1])
            starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=last)
        rows = _table_rows(byte_ids[:last].long(), tables, ns, _offsets(starts, last))
        out = _look_up(rows, tables, out_dtype)
        return out if last == total else F.pad(out, (0, 0, 0, total - last))
    starts, live = _clamped_starts(byte_ids, cu_seqlens)
    ids, offsets = byte_ids.long(), _offsets(starts, total)
    lowest = ids
    for back in range(1, max(ns)):
        lowest = torch.minimum(lowest, _earlier(ids, offsets, back))
    out = _look_up(_table_rows(ids, tables, ns, offsets), tables, out_dtype)
    filling = torch.where(live & (lowest < 0), float("nan"), 0.0).to(out_dtype)
    return torch.where((live & (lowest >= 0))[:, None], out, filling[:, None])


def _clamped_starts(byte_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Values nobody has looked at: where each byte's document starts, and whether it has one."""
    total = byte_ids.shape[0]
    if cu_seqlens is None:
        return None, torch.ones_like(byte_ids, dtype=torch.bool)
    # Bytes of no document lie in a segment before or after all others.
    borders = F.pad(F.pad(cu_seqlens, (0, 1), value=2**31 - 1), (1, 0))
    borders = _checks.clamped_bounds(borders, total)
    starts = torch.repeat_interleave(borders[:-1], borders.diff(), output_size=total)
    positions = torch.arange(total, device=byte_ids.device)
    return starts, (positions >= borders[1]) & (positions < borders[-2])


def _offsets(starts: Tensor | None, total: int) -> Tensor | None:
    """(total,) place of each byte in its document; None for a single document."""
    if starts is None:
        return None
    return torch.arange(total, device=starts.device, dtype=torch.int32) - starts


def _earlier(ids: Tensor, offsets: Tensor | None, back: int) -> Tensor:
    """The id `back` bytes before each byte, 0 before its document."""
    earlier = F.pad(ids, (back, 0))[: ids.shape[0]]
    return earlier if offsets is None else earlier.masked_fill(offsets < back, 0)


def _table_rows(
    ids: Tensor,  # (T,) int64
    tables: Sequence[Tensor],
    ns: Sequence[int],
    offsets: Tensor | None,
) -> Tensor:  # (tables, T)
    """The row that each byte reads in each table."""
    value, rows = ids, [ids] * len(ns)
    for back in range(max(ns)):
        if back:
            value = torch.add(_earlier(ids, offsets, back), value, alpha=HASH_BASE)
        for i, n in enumerate(ns):
            if n == back + 1:
                rows[i] = _floor_mod(value, tables[i].shape[0])
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _floor_mod(value: Tensor, divisor: int) -> Tensor:
    if divisor & (divisor - 1) == 0:  # a fraction of the time of a division
        return value & (divisor - 1)
    return value.remainder(divisor)


def _look_up(rows: Tensor, tables: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    recorded = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
    if recorded or _checks.inside_torch_func():
        return _LookUp.apply(rows, out_dtype, *tables)
    return _read(rows, tables, out_dtype)


def _read(rows: Tensor, tables: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    if len(tables) == 1:
        return tables[0].index_select(0, rows[0]).to(out_dtype)
    if torch.compiler.is_compiling() or _checks.inside_torch_func():
        return _sum_of_rows(rows, tables, out_dtype)
    out = torch.empty((rows.shape[1], tables[0].shape[1]), dtype=out_dtype, device=tables[0].device)
    for piece, place in zip(rows.split(PIECE, 1), out.split(PIECE), strict=True):
        place.copy_(_sum_of_rows(piece, tables, out_dtype))
    return out


def _sum_of_rows(rows: Tensor, tables: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(out_dtype, torch.float32)
    out = tables[0].index_select(0, rows[0]).to(out_dtype).to(wide)
    for table, indices in zip(tables[1:], rows[1:], strict=True):
        out = out + table.index_select(0, indices).to(out_dtype)
    return out.to(out_dtype)


class _LookUp(torch.autograd.Function):
    """The sum of the tables' rows; gradients accumulate in float32 and are rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, out_dtype: torch.dtype, *tables: Tensor) -> Tensor:
        return _read(rows, tables, out_dtype)

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
