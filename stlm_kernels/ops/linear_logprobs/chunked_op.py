"""Row losses above 512 columns as registered ops: for each row, and summed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _library, runtime
from ..._linear.options import RowOptions
from ..._sharding import ROW, SUM, alike
from ..._torch.function import Function

PUBLIC = ("linear_logprobs", "linear_cross_entropy")
"""Ops that call the kernels of row losses; errors of the backward begin with the one called."""


def row_losses(
    op: str,
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) fp32; the backward forms the logits again."""
    dot_dtype = runtime.compute_dtype(rows)
    head = (rows, weight, targets, bias, class_weight)
    loss, lse = _RowLosses[op].apply(*head, dot_dtype, *options)
    return loss, lse


def summed_loss(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    options: RowOptions,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """0-d fp32 sum of the losses, and the lse (N,) if asked.

    The forward forms the gradients of the sum, the backward scales them; where a gradient of the
    lse comes, it forms the logits again.
    """
    recorded = torch.is_grad_enabled()
    wants = [recorded and x is not None and x.requires_grad for x in (rows, weight, bias)]
    dot_dtype = runtime.compute_dtype(rows)
    head = (rows, weight, targets, bias, class_weight)
    total, lse, *_ = _SummedLoss.apply(with_lse, *head, dot_dtype, *options, *wants)
    return total, lse if with_lse else None


class _SummedLoss(Function):
    @staticmethod
    def forward(
        with_lse: bool,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        dot_dtype: torch.dtype,
        *options_and_wants: Any,
    ) -> tuple[Tensor, ...]:
        head = (rows, weight, targets, bias, class_weight)
        return _SUM(*head, dot_dtype, *options_and_wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        with_lse, *head = inputs[:6]
        ctx.options, ctx.wants = inputs[6:-3], inputs[-3:]
        ctx.mark_non_differentiable(*output[2 if with_lse else 1 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*head, *output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        head, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        rows, weight, _, bias, _ = head
        dtotal, dlse = grads[:2]
        if dtotal is dlse is None:
            found = (None,) * 3
        elif dlse is None:
            arguments = (dtotal, rows, weight, bias, *kept)
            found = _library.run_backward(_scaled, "linear_cross_entropy", *arguments)
        else:
            each = torch.zeros_like(dlse) if dtotal is None else dtotal.expand_as(dlse)
            arguments = (*alike((each, dlse)), *head, *ctx.options, *ctx.wants)
            found = _library.run_backward(_ROWS_BWD, "linear_cross_entropy", *arguments)
        drows, dweight, dbias = (x if w else None for x, w in zip(found, ctx.wants, strict=True))
        unused = [None] * (len(ctx.options) + len(ctx.wants))
        return None, drows, dweight, None, dbias, None, *unused


def _scaled(by: Tensor, *leaves_and_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each kept gradient times a 0-d fp32 tensor, in a new one of its leaf's dtype.

    The leaves are here for autograd too: a derivative of the result depends on them.
    """
    leaves, grads = leaves_and_grads[:3], leaves_and_grads[3:]
    return tuple(
        # With a dimension the factor keeps its precision beside a 16-bit tensor.
        None if leaf is None or x is None else torch.mul(x, by.view(1), out=_like(x, leaf.dtype))
        for leaf, x in zip(leaves, grads, strict=True)
    )


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def gradients_meta(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    want_rows: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = rows.new_empty(0, dtype=torch.float32)
    if bias is not None:
        dbias = bias.new_empty(bias.shape if want_bias else 0)
    return (
        rows.new_empty(rows.shape if want_rows else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        dbias,
    )


def _sum_meta(
    rows: Tensor, weight: Tensor, want_rows: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, ...]:
    fp32 = functools.partial(rows.new_empty, dtype=torch.float32)
    return (
        fp32(()),
        fp32(rows.shape[0]),
        rows.new_empty(rows.shape if want_rows else 0),
        fp32(weight.shape if want_weight else 0),
        fp32(weight.shape[:1] if want_bias else 0),
    )


def product_flops(rows: Any, weight: Any, want_rows: bool, want_weight: bool) -> int:
    return 2 * rows[0] * rows[1] * weight[0] * (1 + want_rows + want_weight)


_OPTIONS = (
    "ScalarType dot_dtype, int ignore_index, float softcap, float logit_scale, SymInt valid_vocab, "
    "float label_smoothing, float z_loss"
)
WANTS = "bool want_rows, bool want_weight, bool want_bias"
_HEAD = "Tensor rows, Tensor weight, Tensor targets, Tensor? bias, Tensor? class_weight"
ARGUMENTS = f"{_HEAD}, {_OPTIONS}"

_ROWS = _library.register(
    f"linear_logprobs_chunked_fwd({ARGUMENTS}) -> (Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_rows",
    meta=lambda rows: [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2)],
    flops=lambda rows, weight: product_flops(rows, weight, False, False),
    per_row=("rows", "targets"),
    results=(ROW, ROW),
)
_ROWS_BWD = _library.register(
    f"linear_logprobs_chunked_bwd(Tensor dloss, Tensor dlse, {ARGUMENTS}, {WANTS}) "
    "-> (Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_rows_bwd",
    meta=gradients_meta,
    flops=product_flops,
    per_row=("dloss", "dlse", "rows", "targets"),
    results=(ROW, SUM, SUM),
)
_SUM = _library.register(
    f"linear_cross_entropy_chunked_fwd({ARGUMENTS}, {WANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.chunked_impl:launch_sum",
    meta=_sum_meta,
    flops=product_flops,
    per_row=("rows", "targets"),
    results=(SUM, ROW, ROW, SUM, SUM),
)
_RowLosses = {
    op: _library.differentiable(
        _ROWS,
        of=("rows", "weight", "bias"),
        keep=_library.names_of(_ROWS),
        gradients=lambda needs, dloss, dlse, *rest: _ROWS_BWD(*alike((dloss, dlse)), *rest, *needs),
        derived=2,
        public=op,
    )
    for op in PUBLIC
}
