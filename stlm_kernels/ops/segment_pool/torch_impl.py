"""segment_pool in aten ops: the CPU path, and every case until there is a kernel.

Sums run through EmbeddingBag over rows 0, 1, 2, ..., the fastest segment sum torch has on a CPU,
accumulating in float32 and in a fixed order; their gradient is a gather. The maximum's gradient
goes to the first row that holds the maximum, which no stock op says.

A "bag" is a patch. Where the patches do not cover all rows, there is one more bag before the first
and one after the last: both are cut off again, and autograd gives them the gradient zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks

EXACT_IN_FLOAT32 = 2**24
"""Whole numbers up to this one are exact in float32, whose maximum torch computes fastest."""


def segment_pool(
    x: Tensor,  # (T, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    mode: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    total, borders, visible = x.shape[0], cu_patchlens, _checks.values_visible(cu_patchlens)
    if not visible:
        borders = _checks.clamped_bounds(borders, total)
    if mode in ("first", "last"):
        return _edge_rows(x, borders, visible, last=mode == "last").to(out_dtype)
    covered = visible and int(borders[-1]) == total
    if not covered:
        borders = F.pad(F.pad(borders, (1, 0)), (0, 1), value=total)
    recorded = _checks.inside_torch_func() or (torch.is_grad_enabled() and x.requires_grad)
    if mode == "max":
        x = x.to(out_dtype)
        pooled = _SegmentMax.apply(x, borders) if recorded else _segment_max(x, borders)
    else:
        arguments = (x, borders, mode == "mean", out_dtype)
        pooled = _SegmentSum.apply(*arguments) if recorded else _segment_sum(*arguments)
    return pooled if covered else pooled[1:-1]


def _edge_rows(x: Tensor, borders: Tensor, visible: bool, *, last: bool) -> Tensor:
    if x.shape[0] == 0:
        x = F.pad(x, (0, 0, 0, 1))  # a row for the empty patches to point at
    starts, ends = borders[:-1], borders[1:]
    rows = ends - 1 if last else starts
    filled = ends > starts
    if visible and bool(filled.all()):
        return x.index_select(0, rows.long())
    rows = rows.clamp(0, x.shape[0] - 1).long()
    return torch.where(filled[:, None], x.index_select(0, rows), 0)


def _bag_of(borders: Tensor, total: int) -> Tensor:
    """(T,) int64: the bag that each row lies in."""
    return torch.repeat_interleave(borders.diff().long(), output_size=total)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mean_scale(borders: Tensor, dtype: torch.dtype) -> Tensor:
    return borders.diff().clamp_(min=1).to(dtype).reciprocal_()[:, None]


def _bag_sum(x: Tensor, borders: Tensor) -> Tensor:
    """(bags, D), accumulated in float32 or better."""
    total = x.shape[0]
    if _checks.inside_torch_func():  # EmbeddingBag has no batching rule
        sums = x.new_zeros(borders.shape[0] - 1, x.shape[1], dtype=_wide(x.dtype))
        return sums.index_add(0, _bag_of(borders, total), x.to(sums.dtype)).to(x.dtype)
    rows = torch.arange(total, dtype=torch.int32, device=x.device)
    return F.embedding_bag(rows, x, borders, mode="sum", include_last_offset=True)


def _segment_sum(x: Tensor, borders: Tensor, mean: bool, out_dtype: torch.dtype) -> Tensor:
    x = x.to(out_dtype)
    if not mean:
        return _bag_sum(x, borders)
    # A float16 sum of many rows overflows although their mean does not.
    wide = x.to(_wide(out_dtype))
    return _bag_sum(wide, borders).mul_(_mean_scale(borders, wide.dtype)).to(out_dtype)


class _SegmentSum(torch.autograd.Function):
    """Sum or mean of the rows of each bag; the backward is made of differentiable ops."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, borders: Tensor, mean: bool, out_dtype: torch.dtype) -> Tensor:
        return _segment_sum(x, borders, mean, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, borders, ctx.mean, _ = inputs
        ctx.save_for_backward(borders)
        ctx.total, ctx.dtype = x.shape[0], x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (borders,) = ctx.saved_tensors
        grad = grads[0]
        if ctx.mean:
            grad = grad * _mean_scale(borders, _wide(grad.dtype))
        return grad.to(ctx.dtype).index_select(0, _bag_of(borders, ctx.total)), None, None, None


def _segment_max(x: Tensor, borders: Tensor) -> Tensor:
    bags = _bag_of(borders, x.shape[0])[:, None].expand_as(x)
    maxima = x.new_zeros(borders.shape[0] - 1, x.shape[1])
    return maxima.scatter_reduce_(0, bags, x, "amax", include_self=False)


class _SegmentMax(torch.autograd.Function):
    """Maximum of the rows of each bag; a column's gradient goes to the first row that holds it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, borders: Tensor) -> Tensor:
        return _segment_max(x, borders)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, borders = inputs
        ctx.save_for_backward(x, borders, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, borders, maxima = ctx.saved_tensors
        with torch.no_grad():
            winners = _first_rows_holding(maxima, x, borders)
        # Empty bags point at one row more, which is cut off.
        dx = grads[0].new_zeros(x.shape[0] + 1, x.shape[1]).scatter_(0, winners, grads[0])
        return dx[:-1], None


def _first_rows_holding(maxima: Tensor, x: Tensor, borders: Tensor) -> Tensor:
    """(bags, D) int64: the first row of each bag whose value is the maximum (or NaN), else T.

    All in one float type: comparisons that write booleans take several times as long on a CPU.
    """
    total = x.shape[0]
    dtype = torch.float32 if total <= EXACT_IN_FLOAT32 else torch.float64
    bags = _bag_of(borders, total)
    holds = maxima.to(dtype).index_select(0, bags).eq_(x)
    holds.add_(x.to(dtype, copy=True).ne_(x))
    rows_to_end = torch.arange(total, 0, -1, dtype=dtype, device=x.device)
    holds.mul_(rows_to_end[:, None])
    farthest = holds.new_zeros(maxima.shape)
    farthest.scatter_reduce_(0, bags[:, None].expand_as(holds), holds, "amax")
    return (total - farthest).long()
