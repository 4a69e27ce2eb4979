"""The public linear_logprobs, and the row losses that linear_cross_entropy stands on as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._linear.options import RowOptions, row_options
from ..._sharding import ROW, SUM, alike
from . import chunked_op, torch_impl
from .config import fits_on_chip, unsupported_reasons


@named_errors
def linear_logprobs(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) integer
    *,
    linear_bias: Tensor | None = None,  # (V,)
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the log-sum-exp of its row of logits.

    z = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(z / softcap);
    lse = logsumexp(z[:valid_vocab]), logprob = z[target] - lse. The logits of all rows never exist.

    Args:
        input: (..., D) float32, bfloat16 or float16; float64 on the torch path.
        linear_weight: (V, D) in input's dtype, or float32 beside 16 bits (cast when loaded).
        target: (...) uint8, int16, int32 or int64, widened to int64 before comparing; each in
            [0, valid_vocab) or ignore_index.
        linear_bias: (V,) in input's dtype or float32 beside 16 bits, or None.
        ignore_index: target of the rows that give 0 and take no gradient. None ignores nothing.
        softcap: a finite number > 0, or None.
        logit_scale: a finite number.
        valid_vocab: columns from here on do not exist (a padded table). None: V.
        impl: "auto", "triton" or "torch".

    Returns: (logprob, lse), each (...) float32 (float64 for float64 inputs), both differentiable.
    Raises: ValueError for a wrong type, dtype, shape, device or option; IndexError, on CPU in eager
        mode, for a target outside [0, valid_vocab) that is not ignored; NotImplementedError where
        impl="triton" cannot run, with all reasons.

    >>> h, table, target = torch.randn(5, 16), torch.zeros(256, 16), torch.arange(5)
    >>> round(float(linear_logprobs(h, table, target)[0][0]), 3)  # log(1 / 256)
    -5.545

    Numerics: docs/numerics.md. Source: the recomputing backward is the usual one of fused losses.
    """
    options = row_options(
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, valid_vocab
    )
    loss, lse = row_losses(
        "linear_logprobs", input, linear_weight, target, linear_bias, None, options, impl
    )
    return -loss, lse


def row_losses(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    options: RowOptions,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row, shaped like `target`, for arguments that `row_options` has seen."""
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    if use_triton(
        op,
        impl,
        input.device,
        unsupported_reasons,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        valid_vocab=options.valid_vocab,
    ):
        on_chip = fits_on_chip(options.valid_vocab)
        losses = _single_tile_losses if on_chip else chunked_op.row_losses
        loss, lse = losses(rows, linear_weight, targets, linear_bias, class_weight, options)
    else:
        given = (targets,) if class_weight is None else (targets, class_weight)
        loss, lse = torch_impl.row_losses(
            torch_impl.TARGETS, options, rows, linear_weight, linear_bias, *given
        )
    return loss.view(target.shape), lse.view(target.shape)


def _single_tile_losses(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    dot_dtype = runtime.compute_dtype(rows)
    head = (rows, weight, targets, bias, class_weight)
    loss, lse, *_ = _RowLosses.apply(*head, dot_dtype, *options)
    return loss, lse


class _RowLosses(torch.autograd.Function):
    """Autograd over the registered ops; the logits are formed again in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        dot_dtype: torch.dtype,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        return _FWD(rows, weight, targets, bias, class_weight, dot_dtype, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *head, ctx.dot_dtype = inputs[:6]
        ctx.options = inputs[6:]
        _, _, top, log_total = output
        ctx.mark_non_differentiable(top, log_total)
        ctx.save_for_backward(*head, top, log_total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (*alike(grads[:2]), *ctx.saved_tensors, ctx.dot_dtype, *ctx.options)
        drows = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            drows = _library.run_backward(_BWD_ROWS, "linear_logprobs", *arguments)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            dweight, dbias = _library.run_backward(_BWD_WEIGHT, "linear_logprobs", *arguments)
        return (
            drows,
            dweight if ctx.needs_input_grad[1] else None,
            None,
            dbias if ctx.needs_input_grad[3] else None,
            *[None] * (2 + len(RowOptions._fields)),
        )


_OPTIONS = (
    "ScalarType dot_dtype, int ignore_index, float softcap, float logit_scale, SymInt valid_vocab, "
    "float label_smoothing, float z_loss"
)


def _fwd_meta(rows: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(4))


def _bwd_rows_meta(dloss: Tensor, dlse: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape)


def _bwd_weight_meta(
    dloss: Tensor,
    dlse: Tensor,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    dbias = rows.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return weight.new_empty(weight.shape), dbias


def _fwd_flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * weight[0]


def _bwd_flops(dloss: Any, dlse: Any, rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _fwd_flops(rows, weight)


_FWD = _library.register(
    "linear_logprobs_fwd(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, "
    f"Tensor? class_weight, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher="linear_logprobs:launch_fwd",
    meta=_fwd_meta,
    flops=_fwd_flops,
    per_row=("rows", "targets"),
    results=(ROW, ROW, ROW, ROW),
)
_BWD_ARGUMENTS = (
    "Tensor dloss, Tensor dlse, Tensor rows, Tensor weight, Tensor targets, Tensor? bias, "
    f"Tensor? class_weight, Tensor top, Tensor log_total, {_OPTIONS}"
)
_BWD_PER_ROW = ("dloss", "dlse", "rows", "targets", "top", "log_total")
_BWD_ROWS = _library.register(
    f"linear_logprobs_bwd_rows({_BWD_ARGUMENTS}) -> Tensor",
    launcher="linear_logprobs:launch_bwd_rows",
    meta=_bwd_rows_meta,
    flops=_bwd_flops,
    per_row=_BWD_PER_ROW,
    results=(ROW,),
)
_BWD_WEIGHT = _library.register(
    f"linear_logprobs_bwd_weight({_BWD_ARGUMENTS}) -> (Tensor, Tensor)",
    launcher="linear_logprobs:launch_bwd_weight",
    meta=_bwd_weight_meta,
    flops=_bwd_flops,
    per_row=_BWD_PER_ROW,
    results=(SUM, SUM),
)
