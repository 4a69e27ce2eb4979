"""The public linear_logprobs, and the row losses that linear_cross_entropy stands on as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._linear import chunked
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
    loss, lse = losses(
        "linear_logprobs", input, linear_weight, target, linear_bias, None, options, impl
    )
    assert lse is not None
    return -loss, lse


def losses(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    options: RowOptions,
    impl: Impl,
    *,
    summed: bool = False,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The losses of all rows or their sum, and the lse of each row unless that is not wanted.

    Here alone is decided on which path, for arguments that `row_options` has seen.
    """
    rows, targets = input, target
    if input.dim() != 2:  # else a view would be one more node of autograd
        rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    head = (rows, linear_weight, targets, linear_bias, class_weight)
    on_chip = fits_on_chip(options.valid_vocab)
    loss: Tensor
    lse: Tensor | None
    if not use_triton(
        op, impl, input.device, unsupported_reasons,
        input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias,
        valid_vocab=options.valid_vocab,
    ):  # fmt: skip
        given = (targets,) if class_weight is None else (targets, class_weight)
        operands = (torch_impl.TARGETS, options, rows, linear_weight, linear_bias, *given)
        if summed:
            loss, lse = chunked.summed_loss(*operands, with_lse=with_lse)
        else:
            loss, lse = chunked.row_losses(*operands)
    elif summed and not on_chip and not runtime.inside_torch_func():
        loss, lse = chunked_op.summed_loss(*head, options, with_lse=with_lse)
    else:
        row_losses = _single_tile_losses if on_chip else chunked_op.row_losses
        loss, lse = row_losses(op, *head, options)
        loss = loss.sum() if summed else loss
    if input.dim() != 2:
        loss = loss if summed else loss.view(target.shape)
        lse = None if lse is None else lse.view(target.shape)
    return loss, lse if with_lse else None


def _single_tile_losses(
    op: str,
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    dot_dtype = runtime.compute_dtype(rows)
    head = (rows, weight, targets, bias, class_weight)
    loss, lse, *_ = _RowLosses[op].apply(*head, dot_dtype, *options)
    return loss, lse


_OPTIONS = (
    "ScalarType dot_dtype, int ignore_index, float softcap, float logit_scale, SymInt valid_vocab, "
    "float label_smoothing, float z_loss"
)
_FWD = _library.register(
    "linear_logprobs_fwd(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, "
    f"Tensor? class_weight, {_OPTIONS}) "
    "-> (Tensor loss, Tensor lse, Tensor top, Tensor log_total)",
    launcher="linear_logprobs:launch_fwd",
    meta=lambda rows: [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(4)],
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
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
    meta=lambda rows: rows.new_empty(rows.shape),
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
    per_row=_BWD_PER_ROW,
    results=(ROW,),
)
_BWD_WEIGHT = _library.register(
    f"linear_logprobs_bwd_weight({_BWD_ARGUMENTS}) -> (Tensor, Tensor)",
    launcher="linear_logprobs:launch_bwd_weight",
    meta=lambda rows, weight, bias: _library.empty_like(
        weight, rows.new_empty(0) if bias is None else bias
    ),
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
    per_row=_BWD_PER_ROW,
    results=(SUM, SUM),
)


def _gradients(
    needs: Sequence[bool], dloss: Tensor, dlse: Tensor, *saved: Any
) -> tuple[Tensor | None, ...]:
    arguments = (*alike((dloss, dlse)), *saved)
    drows = _BWD_ROWS(*arguments) if needs[0] else None
    return drows, *(_BWD_WEIGHT(*arguments) if needs[1] or needs[2] else (None, None))


_RowLosses = {
    op: _library.differentiable(
        _FWD,
        of=("rows", "weight", "bias"),
        keep=_library.names_of(_BWD_ROWS)[2:],
        gradients=_gradients,
        derived=2,
        public=op,
    )
    for op in chunked_op.PUBLIC
}
