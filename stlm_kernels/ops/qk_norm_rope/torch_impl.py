"""qk_norm_rope in aten ops: whole tensors as torch differentiates them, or on a CPU by chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import runtime
from ..._torch import autograd, rotary


def qk_norm_rope(
    q: Tensor,  # (N, H, K)
    k: Tensor,  # (N, H_kv, K)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    q_weight: Tensor | None,  # (K,)
    k_weight: Tensor | None,  # (K,)
    positions: Tensor | None,  # (period,)
    period: int,
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both in `out_dtype`; row n stands at positions[n % period], without positions at that."""
    wide = torch.promote_types(out_dtype, torch.float32)
    large = q.is_cpu and q.numel() > rotary.CHUNK_ELEMENTS
    traced = torch.compiler.is_compiling() or runtime.needs_composition(q, k, q_weight, k_weight)
    turn = _Turned.apply if large and not traced else rotary.turned
    with runtime.without_autocast(q):
        cos, sin = (rotary.table_rows(x.to(wide), positions, period) for x in (cos, sin))
        tables = rotary.by_column(cos, sin, interleaved)
        q, k = (x.unflatten(0, (-1, max(1, period))) for x in (q, k))
        q = turn(q, q_weight, *tables, eps, interleaved, out_dtype)
        k = turn(k, k_weight, *tables, eps, interleaved, out_dtype)
    return q.flatten(0, 1), k.flatten(0, 1)


class _Turned(torch.autograd.Function):
    """Rotate chunk by chunk, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        interleaved: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.options = eps, interleaved, out_dtype
        cos, sin = rotary.weighted(cos, sin, weight, interleaved)
        own_eps = None if weight is None else eps
        out = torch.empty(x.shape, dtype=out_dtype)
        for batch, rows in _chunks(x):
            part = x[batch, rows].to(out_dtype).to(cos.dtype)
            out[batch, rows] = rotary.turned_chunk(part, cos[rows], sin[rows], own_eps, interleaved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        if autograd.is_needed(*grads):

            def turn(x: Tensor, weight: Tensor | None) -> Tensor:
                return rotary.turned(x, weight, cos, sin, *ctx.options)

            derived = autograd.gradients(turn, (x, weight), grads)
        else:
            derived = _gradients(grads[0], x, weight, cos, sin, *ctx.options)
        return *derived, None, None, None, None, None


def _gradients(
    grad: Tensor,  # (B, period, H, K)
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> list[Tensor | None]:
    """Gradients of x and the weight."""
    wide = None if weight is None else weight.to(cos.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight = None if wide is None else torch.zeros_like(wide)
    for batch, rows in _chunks(x):
        up = grad[batch, rows].to(cos.dtype)
        part = None if wide is None else x[batch, rows].to(out_dtype).to(cos.dtype)
        dx[batch, rows], along = rotary.chunk_gradients(
            up, part, wide, cos[rows], sin[rows], eps, interleaved
        )
        if dweight is not None and along is not None:
            dweight += along
    return [dx, None if weight is None or dweight is None else dweight.to(weight.dtype)]


def _chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    batches, period, heads, width = x.shape
    return rotary.chunks(batches, period, heads * width)
