"""The public linear_cross_entropy: row losses of linear_logprobs' kernels, and the reduction."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ... import _checks, runtime
from ..._dispatch import Impl
from ..._errors import named_errors
from ..._linear.options import row_options
from ..._sharding import require_rows
from ..linear_logprobs.op import losses

REDUCTIONS = ("mean", "sum", "none")


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_lse: Literal[False] = ...,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_lse: Literal[True],
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@named_errors
def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) integer
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    return_lse: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `input @ linear_weight.T + linear_bias` with `target`, without the logits.

    z = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(z / softcap).
    With lse = logsumexp(z), log p = z - lse, label smoothing s and class weights w a row's loss is
    -(1 - s) * w[target] * log p[target] - s / V * sum(w * log p) + z_loss * lse^2.

    Args:
        input: (..., D) float32, bfloat16 or float16; float64 on the torch path.
        linear_weight: (V, D) in input's dtype, or float32 beside 16 bits (cast when loaded).
        target: (...) uint8, int16, int32 or int64, each in [0, valid_vocab) or ignore_index.
        linear_bias: (V,) in input's dtype or float32 beside 16 bits, or None.
        weight: (V,) constant class weights in input's dtype or float32, or None; not of z-loss.
        return_lse: whether to return (loss, lse) with lse (...), differentiable.
        reduction: "mean" (by class weight where there are some), "sum" or "none".
        ignore_index: rows with this target give 0 and no gradient, even NaN ones. None: no row.
        label_smoothing, z_loss: numbers in [0, 1] and >= 0.
        softcap, logit_scale: a number > 0 or None, and a finite number.
        valid_vocab: columns from here on do not exist (a padded table). None: V.
        impl: "auto", "triton" or "torch".
    Returns: a scalar, or (...) for "none", in float32 (float64 for float64); over no row a mean is
        NaN.
    Raises: ValueError for a wrong type, dtype, shape, device or option or differentiated class
        weights; IndexError, on CPU in eager mode, for a target outside [0, valid_vocab);
        NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> h, table, target = torch.randn(2, 5, 16), torch.randn(256, 16), torch.randint(256, (2, 5))
    >>> linear_cross_entropy(h, table, target, reduction="none").shape
    torch.Size([2, 5])

    Numerics: docs/numerics.md. Source: signature of PyTorch 2.13; z-loss of arXiv 2204.02311.
    """
    options = row_options(
        input, linear_weight, target, linear_bias, ignore_index, softcap, logit_scale, valid_vocab,
        label_smoothing, z_loss,
    )  # fmt: skip
    _check_class_weight(weight, input, linear_weight)
    if not isinstance(return_lse, bool):
        _checks.require(False, "return_lse", "a bool", repr(return_lse))
    _checks.require_choice("reduction", reduction, REDUCTIONS)

    loss, lse = losses(
        "linear_cross_entropy", input, linear_weight, target, linear_bias, weight, options, impl,
        reduction=reduction, with_lse=return_lse,
    )  # fmt: skip
    return loss if lse is None else (loss, lse)


def _check_class_weight(weight: Tensor | None, input: Tensor, linear_weight: Tensor) -> None:
    if weight is None:
        return
    dtypes = _checks.weight_dtypes(input.dtype)
    _checks.require_tensor("weight", weight, linear_weight.shape[:1], dtypes, input.device)
    require_rows(input, {}, {"weight": weight})
    differentiated = weight.requires_grad and torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        differentiated = differentiated or runtime.has_tangent(weight)
    got = "one that is differentiated (use weight.detach())"
    _checks.require(not differentiated, "weight", "class weights that are constants", got)
