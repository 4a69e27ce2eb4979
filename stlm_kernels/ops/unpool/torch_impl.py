"""unpool in aten ops: the CPU path, and every case until there is a kernel.

Forward: one gather from the patch states with the null state above them, the residual added in
place. Backward: scatter_add where it keeps the order of the rows and their precision, which is in
float32 on a CPU. Elsewhere EmbeddingBag over a stable sort of the ids (nearly in order already):
it accumulates 16-bit rows in float32, and needs no atomics on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd
from ..._torch.function import Function

CACHED_ELEMENTS = 1 << 22
"""Results up to this size stay in a CPU's caches, and there index_select is the faster; beyond,
where memory is the bound, gather is."""


def unpool(
    patch_states: Tensor,  # (P, D)
    read_ids: Tensor,  # (T,)
    null_state: Tensor | None,  # (D,)
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    rows = read_ids.to(torch.promote_types(read_ids.dtype, torch.int32)) + 1
    if not runtime.values_visible(read_ids):
        n_patches = patch_states.shape[0]
        rows = torch.where((rows >= 0) & (rows <= n_patches), rows, n_patches + 1)
    if residual is not None:
        residual = residual.to(out_dtype)
    differentiable = (patch_states, null_state, residual)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if runtime.carries_tangents(*differentiable):
        return _read(*differentiable, rows, out_dtype)
    if needs_grad or runtime.inside_torch_func():
        return _Unpool.apply(*differentiable, rows, out_dtype)
    return _read(*differentiable, rows, out_dtype)


def _read(
    patch_states: Tensor,
    null_state: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,  # (T,)
    out_dtype: torch.dtype,
) -> Tensor:
    null = patch_states.new_zeros(patch_states.shape[1]) if null_state is None else null_state
    bad = torch.full_like(null, float("nan"))
    parts = (null[None], patch_states, bad[None])
    table = torch.cat([part.to(out_dtype) for part in parts])
    out = _rows_of(table, rows)
    if residual is None:
        return out
    if runtime.inside_torch_func():  # vmap refuses to add what is batched in place
        return out + residual
    return out.add_(residual)


def _rows_of(table: Tensor, rows: Tensor) -> Tensor:
    if runtime.values_visible(rows) and rows.shape[0] * table.shape[1] <= CACHED_ELEMENTS:
        return table.index_select(0, rows)
    return table.gather(0, _whole_rows(rows, table))


def _whole_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(T, D) int64: an expanded index lets torch copy and add whole rows at a time."""
    return rows.long()[:, None].expand(-1, x.shape[1])


class _Unpool(Function):
    """Row 0 is the null state, rows 1..P the patches, row P+1 the NaN of ids out of range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        patch_states: Tensor,
        null_state: Tensor | None,
        residual: Tensor | None,
        rows: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return autograd.as_output(_read(patch_states, null_state, residual, rows, out_dtype))

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
            sums = _sums_by_row(grad, rows, ctx.n_rows, sums_dtype)
            dstates = sums[1:-1].to(ctx.dtype)
            dnull = sums[0].to(ctx.null_dtype) if ctx.needs_input_grad[1] else None
        return dstates, dnull, grad if ctx.needs_input_grad[2] else None, None, None


def _sums_by_row(
    grad: Tensor,  # (T, D)
    rows: Tensor,  # (T,) int32 in [0, n_rows)
    n_rows: int,
    dtype: torch.dtype,
) -> Tensor:  # (n_rows, D), in no fewer bits than `dtype`
    wide = torch.promote_types(grad.dtype, torch.float32)
    casts_once_in_order = grad.device.type == "cpu" and grad.dtype == wide
    if casts_once_in_order or torch.is_grad_enabled() or runtime.inside_torch_func():
        sums = grad.new_zeros(n_rows, grad.shape[1], dtype=wide)
        return sums.scatter_add_(0, _whole_rows(rows, grad), grad.to(wide))
    ones = torch.ones_like(rows)
    counts = ones.new_zeros(n_rows).scatter_add_(0, rows.long(), ones)
    boundaries = F.pad(counts.cumsum(0), (1, 0))
    order = torch.sort(rows, stable=True).indices
    return F.embedding_bag(order, grad.to(dtype), boundaries, mode="sum", include_last_offset=True)
