"""Row losses above 512 columns as registered ops: for each row, and summed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks, _library
from ..._sharding import ROW, SUM, alike

if TYPE_CHECKING:
    from .op import RowOptions


def row_losses(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) fp32; the backward forms the logits again."""
    dot_dtype = _checks.output_dtype(rows)
    loss, lse = _RowLosses.apply(rows, weight, targets, bias, dot_dtype, *options)
    return loss, lse


def summed_loss(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    options: RowOptions,
) -> Tensor:
    """0-d fp32 sum of the losses; the forward forms the gradients, the backward scales them."""
    recorded = torch.is_grad_enabled()
    wants = [recorded and x is not None and x.requires_grad for x in (rows, weight, bias)]
    dot_dtype = _checks.output_dtype(rows)
    total, *_ = _SummedLoss.apply(rows, weight, targets, bias, dot_dtype, *options, *wants)
    return total


class _RowLosses(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        dot_dtype: torch.dtype,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        return _ROWS(rows, weight, targets, bias, dot_dtype, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, weight, targets, bias, *ctx.options = inputs
        ctx.save_for_backward(rows, weight, targets, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wants = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        arguments = (*alike(grads), *ctx.saved_tensors, *ctx.options, *wants)
        found = _library.run_backward(_ROWS_BWD, "linear_logprobs", *arguments)
        drows, dweight, dbias = (x if w else None for x, w in zip(found, wants, strict=True))
        return drows, dweight, None, dbias, *[None] * len(ctx.options)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        dot_dtype: torch.dtype,
        *options_and_wants: Any,
    ) -> tuple[Tensor, ...]:
        return _SUM(rows, weight, targets, bias, dot_dtype, *options_and_wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, weight, _, bias, *rest = inputs
        ctx.wants, ctx.arguments = rest[-3:], len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rows, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grads[0], *ctx.saved_tensors)
        found = _library.run_backward(_scaled, "linear_cross_entropy", *arguments)
        drows, dweight, dbias = (x if w else None for x, w in zip(found, ctx.wants, strict=True))
        return drows, dweight, None, dbias, *[None] * (ctx.arguments - 4)


def _scaled(by: Tensor, *leaves_and_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each kept gradient times a 0-d fp32 tensor, in a new one of its leaf's dtype.

    The leaves are here for autograd too: whoever differentiates the result depends on them.
    """
    leaves, grads = leaves_and_grads[:3], leaves_and_grads[3:]
    return tuple(
        # With a dimension the factor keeps its precision beside a 16-bit tensor.
        None if leaf is None or x is None else torch.mul(x, by.view(1), out=_like(x, leaf.dtype))
        for leaf, x in zip(leaves, grads, strict=True)
    )


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _rows_meta(rows: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))


def _rows_bwd_meta(
    dloss: Tensor,
    dlse: Tensor,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    want_rows, want_weight, want_bias = rest[-3:]
    dbias = rows.new_empty(0, dtype=torch.float32)
    if bias is not None:
        dbias = bias.new_empty(bias.shape if want_bias else 0)
    return (
        rows.new_empty(rows.shape if want_rows else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        dbias,
    )


def _sum_meta(
    rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_rows, want_weight, want_bias = rest[-3:]
    return (
        rows.new_empty((), dtype=torch.float32),
        rows.new_empty(rows.shape if want_rows else 0),
        rows.new_empty(weight.shape if want_weight else 0, dtype=torch.float32),
        rows.new_empty(weight.shape[:1] if want_bias else 0, dtype=torch.float32),
    )


def _product_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * weight[0]


def _rows_bwd_flops(dloss: Any, dlse: Any, rows: Any, weight: Any, *rest: Any, **__: Any) -> int:
    return _product_flops(rows, weight) * (1 + sum(rest[-3:-1]))


def _sum_flops(rows: Any, weight: Any, *rest: Any, **__: Any) -> int:
    return _product_flops(rows, weight) * (1 + sum(rest[-3:-1]))


_OPTIONS = (
    "ScalarType dot_dtype, int ignore_index, float softcap, float logit_scale, SymInt valid_vocab, "
    "float label_smoothing, float z_loss"
)
_WANTS = "bool want_rows, bool want_weight, bool want_bias"
_ARGUMENTS = f"Tensor rows, Tensor weight, Tensor targets, Tensor? bias, {_OPTIONS}"

_ROWS = _library.register(
    f"linear_logprobs_chunked_fwd({_ARGUMENTS}) -> (Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_rows",
    meta=_rows_meta,
    flops=_product_flops,
    per_row=("rows", "targets"),
    results=(ROW, ROW),
)
_ROWS_BWD = _library.register(
    f"linear_logprobs_chunked_bwd(Tensor dloss, Tensor dlse, {_ARGUMENTS}, {_WANTS}) "
    "-> (Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_rows_bwd",
    meta=_rows_bwd_meta,
    flops=_rows_bwd_flops,
    per_row=("dloss", "dlse", "rows", "targets"),
    results=(ROW, SUM, SUM),
)
_SUM = _library.register(
    f"linear_cross_entropy_chunked_fwd({_ARGUMENTS}, {_WANTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_sum",
    meta=_sum_meta,
    flops=_sum_flops,
    per_row=("rows", "targets"),
    results=(SUM, ROW, SUM, SUM),
)
