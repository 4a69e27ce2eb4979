"""The public linear_cross_entropy: row losses of linear_logprobs' kernels, and the reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import Impl, use_triton
from ..linear_logprobs import chunked_op
from ..linear_logprobs.launch import fits_on_chip
from ..linear_logprobs.op import RowOptions, check, row_losses
from ..linear_logprobs.torch_impl import TARGETS
from . import torch_impl
from .launch import unsupported_reasons

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) integer
    *,
    linear_bias: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of `input @ linear_weight.T + linear_bias` with `target`, without the logits.

    z = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(z / softcap),
    columns from valid_vocab on removed. A row's loss is its cross entropy with the target
    (smoothed over the valid_vocab columns) + z_loss * logsumexp(z)^2. Names and order of
    `torch.nn.functional.linear_cross_entropy` without `weight` and `options`; there
    ignore_index=None reads as -100, here it ignores nothing.

    Args:
        input: (..., D) float32, bfloat16 or float16; float64 on the torch path.
        linear_weight: (V, D) in the input's dtype, or float32 beside a 16-bit input (rounded to
            the input's dtype when loaded).
        target: (...) uint8, int16, int32 or int64, widened to int64 before comparing; each in
            [0, valid_vocab) or ignore_index.
        linear_bias: (V,) in the weight's or the input's dtype, or None.
        reduction: "mean" over the rows not ignored, "sum", or "none".
        ignore_index: rows with this target give 0 and take no gradient, even where their input is
            NaN. None ignores nothing.
        label_smoothing: in [0, 1].
        z_loss: weight >= 0 of the squared log-sum-exp.
        softcap: > 0, or None.
        logit_scale: a finite number.
        valid_vocab: columns from here on do not exist (a padded table). None: V.
        impl: "auto", "triton" or "torch".

    Returns:
        A scalar, or (...) for "none", float32 (float64 for float64 inputs). A mean over no row is
        NaN with gradients of exactly 0; a sum of nothing is 0.

    Raises:
        ValueError: a wrong type, dtype, shape, device or scalar.
        IndexError: on CPU in eager mode, a target outside [0, valid_vocab) that is not ignored.
        NotImplementedError: impl="triton" cannot run this call; the message lists why.

    Numerics:
        As `linear_logprobs`. On the torch path, and on the kernels above 512 columns, "mean" and
        "sum" form their gradients in the forward, chunk by chunk, and scale them by the upstream
        gradient in the backward, out of place. Beside that of the input (N, D), extra memory
        does not grow with the number of rows: on the kernels above 512 columns 256 MB of logits,
        and the weight in the input's dtype and its gradient in float32. The torch path holds rows
        of 16 bits, and their gradient, in float32.

    Source: signature of PyTorch 2.13; z-loss from PaLM, arXiv 2204.02311.
    """
    options = check(
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, valid_vocab
    )
    _checks.require_choice("reduction", reduction, REDUCTIONS)
    ok = _checks.is_number(label_smoothing) and 0 <= label_smoothing <= 1
    _checks.require_number(ok, "label_smoothing", "a number in [0, 1]", label_smoothing)
    ok = _checks.is_finite(z_loss) and z_loss >= 0
    _checks.require_number(ok, "z_loss", "a finite number >= 0", z_loss)
    options = options._replace(label_smoothing=float(label_smoothing), z_loss=float(z_loss))

    on_kernels = use_triton(
        "linear_cross_entropy",
        impl,
        input.device,
        unsupported_reasons,
        input=input,
        linear_weight=linear_weight,
        target=target,
        valid_vocab=valid_vocab,
    )
    on_chip = fits_on_chip(options.valid_vocab)
    if reduction == "none" or (on_kernels and (on_chip or _checks.inside_torch_func())):
        path: Impl = "triton" if on_kernels else "torch"
        loss, _ = row_losses(
            "linear_cross_entropy", input, linear_weight, target, linear_bias, options, path
        )
        return loss if reduction == "none" else _reduced(loss.sum(), target, reduction, options)
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    if on_kernels:
        total = chunked_op.summed_loss(rows, linear_weight, targets, linear_bias, options)
    else:
        total = torch_impl.summed_loss(TARGETS, options, rows, linear_weight, linear_bias, targets)
    return _reduced(total, target, reduction, options)


def _reduced(total: Tensor, target: Tensor, reduction: str, options: RowOptions) -> Tensor:
    if reduction == "sum":
        return total
    return mean_of_counted(total, (target.long() != options.ignore_index).sum())


def mean_of_counted(total: Tensor, count: Tensor) -> Tensor:
    """The mean of a sum of row losses; over no row NaN, with gradients of exactly 0."""
    if _checks.values_visible(total, count) and count > 0:
        return total / count
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))
