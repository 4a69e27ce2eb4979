"""qk_norm_rope in aten ops: whole tensors as torch differentiates them, or on a CPU by chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd
from ..._torch.casting import cast

CHUNK_ELEMENTS = 1 << 18
"""Turned at a time on a CPU, 1 MB in fp32: the passes over them stay in a cache."""


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
    large = q.is_cpu and q.numel() > CHUNK_ELEMENTS
    traced = torch.compiler.is_compiling() or runtime.inside_torch_func()
    turn = _Turned.apply if large and not traced else _turned
    with runtime.without_autocast(q):
        cos, sin = (_rows_of(x.to(wide), positions, period) for x in (cos, sin))
        tables = _by_column(cos, sin, interleaved)
        q, k = (x.unflatten(0, (-1, max(1, period))) for x in (q, k))
        q = turn(q, q_weight, *tables, eps, interleaved, out_dtype)
        k = turn(k, k_weight, *tables, eps, interleaved, out_dtype)
    return q.flatten(0, 1), k.flatten(0, 1)


def _rows_of(table: Tensor, positions: Tensor | None, period: int) -> Tensor:
    """(period, 1, K/2) for each position in turn; NaN for one out of range."""
    if positions is None:
        return table[:period, None]
    places = positions.long()
    inside = (places >= 0) & (places < table.shape[0])
    rows = torch.cat([table, torch.full_like(table[:1], torch.nan)])
    return rows.index_select(0, torch.where(inside, places, table.shape[0]))[:, None]


def _by_column(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(period, 1, K) each: a column turns to column * cos + partner * sin."""
    if interleaved:
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
        return cos, sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _partner(x: Tensor, interleaved: bool) -> Tensor:
    """The other column of each pair."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


def _turned(
    x: Tensor,  # (B, period, H, K)
    weight: Tensor | None,  # (K,)
    cos: Tensor,  # (period, 1, K) fp32 or fp64
    sin: Tensor,  # (period, 1, K)
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B, period, H, K), by ops that torch differentiates any number of times."""
    x = cast(x, out_dtype, cos.dtype)
    if weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight.to(cos.dtype), eps)
    return torch.addcmul(x * cos, _partner(x, interleaved), sin).to(out_dtype)


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
        if weight is not None:  # folded into the tables, which are as small as one head
            wide = weight.to(cos.dtype)
            cos, sin = cos * wide, sin * _partner(wide, interleaved)
        out = torch.empty(x.shape, dtype=out_dtype)
        for batch, rows in _chunks(x):
            part = x[batch, rows].to(out_dtype).to(cos.dtype)
            if weight is not None:
                part = part * _scales(part, eps)
            swapped = _partner(part, interleaved)
            out[batch, rows] = torch.mul(part, cos[rows]).addcmul_(swapped, sin[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        if autograd.is_needed(*grads):

            def turn(x: Tensor, weight: Tensor | None) -> Tensor:
                return _turned(x, weight, cos, sin, *ctx.options)

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
        # A pair's partner is its own partner's: the rotation turns back by the same swap.
        up = _partner(up * sin[rows], interleaved).addcmul_(up, cos[rows])
        if wide is not None and dweight is not None:
            part = x[batch, rows].to(out_dtype).to(cos.dtype)
            scales = _scales(part, eps)
            part = part * scales
            along = up * part
            dweight += along.sum((0, 1, 2))
            slope = (along @ wide)[..., None] / wide.shape[0]
            up = up.mul_(wide).addcmul_(part, slope, value=-1).mul_(scales)
        dx[batch, rows] = up
    return [dx, None if weight is None or dweight is None else dweight.to(weight.dtype)]


def _scales(x: Tensor, eps: float) -> Tensor:
    """(..., 1): one over the root mean square of each head."""
    return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of whole batches, or of rows of one, (batch, rows) of an x (B, period, H, K)."""
    batches, period = x.shape[:2]
    most = max(1, CHUNK_ELEMENTS // (x.shape[2] * x.shape[3]))
    rows, together = min(period, most), max(1, most // max(1, period))
    for first in range(0, batches, together):
        for start in range(0, period, max(1, rows)):
            yield slice(first, first + together), slice(start, start + rows)
