"""unpool in aten ops: the CPU path, and every case until there is a kernel.

Forward: one gather from the patch states with the null state above them, the residual added in
place. Backward: rows brought into the order of their ids (they nearly are in order, and a stable
sort keeps the sum's order fixed) and summed by EmbeddingBag, which accumulates in float32 and adds
nothing to a patch but its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks


def unpool(
    patch_states: Tensor,  # (P, D)
    read_ids: Tensor,  # (T,)
    null_state: Tensor | None,  # (D,)
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    rows = read_ids.to(torch.promote_types(read_ids.dtype, torch.int32)) + 1
    if residual is not None:
        residual = residual.to(out_dtype)
    differentiable = (patch_states, null_state, residual)
    recorded = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if recorded or _checks.inside_torch_func():
        return _Unpool.apply(*differentiable, rows, out_dtype)
    return _read(*differentiable, rows, out_dtype)


def _read(
    patch_states: Tensor,
    null_state: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,  # (T,): 0 is the null state, 1..P the patches
    out_dtype: torch.dtype,
) -> Tensor:
    states = patch_states.to(out_dtype)
    null = states.new_zeros(states.shape[1]) if null_state is None else null_state.to(out_dtype)
    table = torch.cat([null[None], states])
    if not _checks.values_visible(rows):
        table = F.pad(table, (0, 0, 0, 1), value=float("nan"))
        rows = _made_safe(rows, table.shape[0])
    out = table.index_select(0, rows)
    if residual is None:
        return out
    if _checks.inside_torch_func():  # vmap refuses to add what is batched in place
        return out + residual
    return out.add_(residual)


def _made_safe(rows: Tensor, n_rows: int) -> Tensor:
    """Rows out of range point at the last one, which is no patch."""
    return torch.where((rows >= 0) & (rows < n_rows), rows, n_rows - 1)


class _Unpool(torch.autograd.Function):
    """A gather whose backward is a segment sum, unless that is to be differentiated itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        patch_states: Tensor,
        null_state: Tensor | None,
        residual: Tensor | None,
        rows: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return _read(patch_states, null_state, residual, rows, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        patch_states, null_state, _, rows, _ = inputs
        ctx.save_for_backward(rows)
        ctx.n_rows, ctx.dtype = patch_states.shape[0] + 2, patch_states.dtype
        ctx.null_dtype = ctx.dtype if null_state is None else null_state.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        grad = grads[0]
        dstates = dnull = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            sums_dtype = torch.promote_types(ctx.dtype, ctx.null_dtype)
            sums = _sums_by_row(grad, _made_safe(rows, ctx.n_rows), ctx.n_rows, sums_dtype)
            dstates = sums[1:-1].to(ctx.dtype)
            dnull = sums[0].to(ctx.null_dtype) if ctx.needs_input_grad[1] else None
        return dstates, dnull, grad if ctx.needs_input_grad[2] else None, None, None


def _sums_by_row(
    grad: Tensor,  # (T, D)
    rows: Tensor,  # (T,) int32 in [0, n_rows)
    n_rows: int,
    dtype: torch.dtype,
) -> Tensor:  # (n_rows, D), rounded no further than `dtype`
    if torch.is_grad_enabled() or _checks.inside_torch_func():
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad.new_zeros(n_rows, grad.shape[1], dtype=wide).index_add(0, rows, grad.to(wide))
    ones = torch.ones_like(rows)
    counts = ones.new_zeros(n_rows).scatter_add_(0, rows.long(), ones)
    borders = F.pad(counts.cumsum(0), (1, 0))
    order = torch.sort(rows, stable=True).indices
    return F.embedding_bag(order, grad.to(dtype), borders, mode="sum", include_last_offset=True)
