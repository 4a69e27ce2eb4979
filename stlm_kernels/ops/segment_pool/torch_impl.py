"""segment_pool in aten ops: the CPU path, and every case until there is a kernel.

Sums run through EmbeddingBag over rows 0, 1, 2, ..., the fastest segment sum torch has on a CPU,
accumulating in float32 and in a fixed order; their gradient is a gather. The gradient of
a maximum or minimum goes to the first row that holds it, which no op of torch says.

A "bag" is a patch. Where the patches do not cover all rows, there is one more bag before the first
and one after the last: both are cut off again, and autograd gives them the gradient zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd, segments
from ..._torch.function import Function

EXACT_IN_FLOAT32 = 2**24
"""Whole numbers up to this one are exact in float32, whose maximum torch computes fastest."""


def segment_pool(
    x: Tensor,  # (T, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    mode: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    total, boundaries, visible = x.shape[0], cu_patchlens, runtime.values_visible(cu_patchlens)
    if not visible:
        boundaries = segments.clamped_bounds(boundaries, total)
    if mode in ("first", "last"):
        return _edge_rows(x, boundaries, visible, last=mode == "last").to(out_dtype)
    covered = visible and int(boundaries[-1]) == total
    if not covered:
        # Not F.pad: it makes a Python number of `total`, and compiled code would fix T.
        boundaries = torch.cat(
            [boundaries.new_zeros(1), boundaries, boundaries.new_full((1,), total)]
        )
    needs_grad = runtime.inside_torch_func() or (torch.is_grad_enabled() and x.requires_grad)
    if mode in ("max", "min"):
        extremes = _SegmentExtreme.apply if needs_grad else _segment_extreme
        if runtime.carries_tangents(x):
            extremes = _picked
        pooled = extremes(x.to(out_dtype), boundaries, f"a{mode}")
    else:
        arguments = (x, boundaries, mode == "mean", out_dtype)
        needs_grad = needs_grad and not runtime.carries_tangents(x)
        pooled = _SegmentSum.apply(*arguments) if needs_grad else _segment_sum(*arguments)
    return pooled if covered else pooled[1:-1]


def _edge_rows(x: Tensor, boundaries: Tensor, visible: bool, *, last: bool) -> Tensor:
    if x.shape[0] == 0:
        x = F.pad(x, (0, 0, 0, 1))  # a row for the empty patches to point at
    starts, ends = boundaries[:-1], boundaries[1:]
    rows = ends - 1 if last else starts
    filled = ends > starts
    if visible and bool(filled.all()):
        return x.index_select(0, rows.long())
    rows = rows.clamp(0, x.shape[0] - 1).long()
    return torch.where(filled[:, None], x.index_select(0, rows), 0)


def _bag_of(boundaries: Tensor, shape: torch.Size) -> Tensor:
    """int64 of the given (T, D): the bag that each row lies in.

    An expanded index lets torch copy, add and compare whole rows at a time.
    """
    bags = segments.segment_of_row(boundaries.long(), shape[0])
    return bags[:, None].expand(shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _lengths(boundaries: Tensor) -> Tensor:
    """(bags, 1) to divide by."""
    return boundaries.diff().clamp_(min=1)[:, None]


def _bag_sum(x: Tensor, boundaries: Tensor) -> Tensor:
    """(bags, D), accumulated in float32 or better."""
    if runtime.needs_composition(x):  # EmbeddingBag has no batching rule, nor a forward one
        sums = x.new_zeros(boundaries.shape[0] - 1, x.shape[1], dtype=_wide(x.dtype))
        return sums.scatter_add(0, _bag_of(boundaries, x.shape), x.to(sums.dtype)).to(x.dtype)
    return segments.segment_sum(x, boundaries)


def _segment_sum(x: Tensor, boundaries: Tensor, mean: bool, out_dtype: torch.dtype) -> Tensor:
    x = x.to(out_dtype)
    if not mean:
        return _bag_sum(x, boundaries)
    # A float16 sum of many rows overflows although their mean does not.
    return _bag_sum(x.to(_wide(out_dtype)), boundaries).div_(_lengths(boundaries)).to(out_dtype)


class _SegmentSum(Function):
    """Sum or mean of the rows of each bag; the backward is made of differentiable ops."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, boundaries: Tensor, mean: bool, out_dtype: torch.dtype) -> Tensor:
        return autograd.as_output(_segment_sum(x, boundaries, mean, out_dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, boundaries, ctx.mean, _ = inputs
        ctx.save_for_backward(boundaries)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (boundaries,) = ctx.saved_tensors
        grad = grads[0]
        if ctx.mean:
            grad = grad.to(_wide(grad.dtype)) / _lengths(boundaries)
        return grad.to(ctx.dtype).gather(0, _bag_of(boundaries, ctx.shape)), None, None, None


def _segment_extreme(x: Tensor, boundaries: Tensor, reduce: str) -> Tensor:
    """Reduce by "amax" or "amin"; 0 for an empty bag."""
    zeros, bags = x.new_zeros(boundaries.shape[0] - 1, x.shape[1]), _bag_of(boundaries, x.shape)
    if runtime.inside_torch_func():  # vmap refuses to write what is batched in place
        return zeros.scatter_reduce(0, bags, x, reduce, include_self=False)
    return zeros.scatter_reduce_(0, bags, x, reduce, include_self=False)


def _picked(x: Tensor, boundaries: Tensor, reduce: str) -> Tensor:
    """Gather the rows that hold the extremes, which torch differentiates itself."""
    values = x.detach()
    winners = _first_rows_holding(_segment_extreme(values, boundaries, reduce), values, boundaries)
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).gather(0, winners)


class _SegmentExtreme(Function):
    """Maximum or minimum of each bag; a column's gradient goes to the first row that holds it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, boundaries: Tensor, reduce: str) -> Tensor:
        return autograd.as_output(_segment_extreme(x, boundaries, reduce))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, boundaries, _ = inputs
        ctx.save_for_backward(x, boundaries, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, boundaries, extremes = ctx.saved_tensors
        grad = grads[0]
        with torch.no_grad():
            winners = _first_rows_holding(extremes, x, boundaries)
        # Empty bags point at one row more, which is cut off.
        zeros = grad.new_zeros(x.shape[0] + 1, x.shape[1])
        if runtime.inside_torch_func():  # vmap refuses to write what is batched in place
            return zeros.scatter(0, winners, grad)[:-1], None, None
        return zeros.scatter_(0, winners, grad)[:-1], None, None


def _first_rows_holding(extremes: Tensor, x: Tensor, boundaries: Tensor) -> Tensor:
    """(bags, D) int64: the first row of each bag whose value is the extreme (or NaN), else T.

    All in one float type: comparisons that write booleans take several times as long on a CPU.
    """
    total = x.shape[0]
    exact = torch.float32 if total <= EXACT_IN_FLOAT32 else torch.float64
    dtype, bags = torch.promote_types(x.dtype, exact), _bag_of(boundaries, x.shape)
    holds = extremes.to(dtype).gather(0, bags).eq_(x)
    if not runtime.values_visible(extremes) or bool(extremes.sum().isnan()):
        holds.add_(x.to(dtype, copy=True).ne_(x))
    rows_to_end = torch.arange(total, 0, -1, dtype=dtype, device=x.device)
    holds.mul_(rows_to_end[:, None])
    farthest = holds.new_zeros(extremes.shape)
    farthest.scatter_reduce_(0, bags, holds, "amax")
    return (total - farthest).long()
