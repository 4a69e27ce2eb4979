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
from ..._linear.mean import counted, mean_of_counted
from ..._linear.options import RowOptions, row_options
from ..._sharding import ROW, SUM, is_dtensor
from . import chunked_op, torch_impl
from .chunked_op import ARGUMENTS, WANTS
from .config import fits_on_chip, fits_one_kernel, unsupported_reasons


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
    reduction: str = "none",
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The losses of all rows, their sum or mean, and the lse of each row unless it is not wanted.

    Here alone is decided on which path, for arguments that `row_options` has seen.
    """
    rows, targets = input, target
    if input.dim() != 2:  # else a view would be one more node of autograd
        rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    head = (rows, linear_weight, targets, linear_bias, class_weight)
    on_chip, summed = fits_on_chip(options.valid_vocab), reduction != "none"
    mean = reduction == "mean"
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
    elif summed and not runtime.inside_torch_func():
        if on_chip:
            in_kernel = mean and not is_dtensor(rows)
            loss, lse = _single_tile_sum(*head, options, mean=in_kernel, with_lse=with_lse)
            mean = mean and not in_kernel
        else:
            loss, lse = chunked_op.summed_loss(*head, options, with_lse=with_lse)
    else:
        row_losses = _single_tile_losses if on_chip else chunked_op.row_losses
        loss, lse = row_losses(op, *head, options)
        loss = loss.sum() if summed else loss
    if mean:
        loss = mean_of_counted(loss, counted(target, class_weight, options))
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
    loss, lse = _RowLosses[op].apply(*head, dot_dtype, *options)
    return loss, lse


def _single_tile_sum(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: RowOptions,
    *,
    mean: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    dot_dtype = runtime.compute_dtype(rows)
    differentiated = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    plain = bias is class_weight is None and not options.softcap and not options.z_loss
    fits = fits_one_kernel(rows.shape[1], options.valid_vocab, dot_dtype, rows.device)
    kept = differentiated and plain and fits
    head = (rows, weight, targets, bias, class_weight)
    loss, lse, *_ = _SummedLoss.apply(*head, dot_dtype, *options, mean, with_lse, kept)
    return loss, lse if with_lse else None


_FWD = _library.register(
    f"linear_logprobs_fwd({ARGUMENTS}) -> (Tensor loss, Tensor lse)",
    launcher="linear_logprobs:launch_fwd",
    meta=lambda rows: [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2)],
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
    per_row=("rows", "targets"),
    results=(ROW, ROW),
)
_BWD = _library.register(
    f"linear_logprobs_bwd(Tensor? dloss, Tensor? dlse, {ARGUMENTS}, {WANTS}) "
    "-> (Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.dlogits_impl:launch_bwd",
    meta=chunked_op.gradients_meta,
    flops=chunked_op.product_flops,
    per_row=("dloss", "dlse", "rows", "targets"),
    results=(ROW, SUM, SUM),
)


def _sum_meta(rows: Tensor, with_lse: bool, kept: bool) -> tuple[Tensor, ...]:
    scalars = [rows.new_empty((), dtype=torch.float32) for _ in range(2)]
    lse, top, log_total = (
        rows.new_empty(rows.shape[0] if stored else 0, dtype=torch.float32)
        for stored in (with_lse, kept, kept)
    )
    return scalars[0], lse, scalars[1], top, log_total, top.new_empty(top.shape, dtype=torch.int32)


_SUM = _library.register(
    f"linear_cross_entropy_fwd({ARGUMENTS}, bool mean, bool with_lse, bool kept) -> (Tensor loss, "
    "Tensor lse, Tensor divisor, Tensor top, Tensor log_total, Tensor codes)",
    launcher="linear_logprobs:launch_sum",
    meta=_sum_meta,
    flops=lambda rows, weight: 2 * rows[0] * rows[1] * weight[0],
    per_row=("rows", "targets"),
    results=(SUM, ROW, SUM, ROW, ROW, ROW),
)
_SUM_BWD = _library.register(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor? divisor, Tensor? top, "
    f"Tensor? log_total, Tensor? codes, {ARGUMENTS}, {WANTS}) -> (Tensor, Tensor, Tensor)",
    launcher="linear_logprobs.backward_impl:launch_sum_bwd",
    meta=chunked_op.gradients_meta,
    flops=chunked_op.product_flops,
    per_row=("dlse", "top", "log_total", "codes", "rows", "targets"),
    results=(ROW, SUM, SUM),
)


def _sum_gradients(
    needs: Sequence[bool],
    dloss: Tensor | None,
    dlse: Tensor | None,
    divisor: Tensor,
    top: Tensor,
    log_total: Tensor,
    codes: Tensor,
    *head_and_results: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *head, mean, with_lse, kept = head_and_results
    if not with_lse:
        dlse = None  # of an empty tensor, which torch.compile fills
    if dloss is None:
        return _BWD(None, dlse, *head, *needs)
    known = (top, log_total, codes) if kept else (None,) * 3
    return _SUM_BWD(dloss, dlse, divisor if mean else None, *known, *head, *needs)


_RowLosses = {
    op: _library.differentiable(
        _FWD,
        of=("rows", "weight", "bias"),
        keep=_library.names_of(_FWD),
        gradients=lambda needs, *rest: _BWD(*rest, *needs),
        derived=2,
        fills=False,
        public=op,
    )
    for op in chunked_op.PUBLIC
}
_SummedLoss = _library.differentiable(
    _SUM,
    of=("rows", "weight", "bias"),
    keep=(
        "divisor",
        "top",
        "log_total",
        "codes",
        *_library.names_of(_FWD),
        "mean",
        "with_lse",
        "kept",
    ),
    gradients=_sum_gradients,
    derived=2,
    fills=False,
)
