"""The public linear_kl_div: contract, checks and the chunked torch path, which is all there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import Impl, without_kernel
from ..._errors import named_errors
from ..._linear.chunked import row_losses, summed_loss
from ..._linear.mean import mean_of_counted
from ..._linear.options import DistillOptions, check_projection
from ..._sharding import require_plain
from ..linear_cross_entropy.op import REDUCTIONS
from .torch_impl import DIVERGENCE


@named_errors
def linear_kl_div(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    teacher_logits: Tensor,  # (..., valid_vocab)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (...) bool
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return temperature^2 * KL(teacher || student) of rows, without the student's logits.

    z = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(z / softcap),
    without columns from valid_vocab on; p = softmax(teacher_logits / temperature), q =
    softmax(z / temperature). A row's loss is temperature^2 * sum(p * (log p - log q)).

    Args:
        input: (..., D) float32, bfloat16, float16 or float64.
        linear_weight: (V, D) in input's dtype, or float32 beside 16 bits (cast when loaded).
        teacher_logits: (..., valid_vocab) float32, bfloat16 or float16 (float64 beside float64),
            neither scaled, capped nor cast; no gradient. -inf excludes a column.
        linear_bias: (V,) in input's dtype or float32 beside 16 bits, or None.
        temperature: a finite number > 0.
        mask: (...) bool, True where a row counts; others give 0 and no gradient, even NaN ones.
            None: all.
        reduction: "mean" over the rows that count, "sum", or "none".
        softcap, logit_scale: a number > 0 or None, and a finite number.
        valid_vocab: columns from here on do not exist (a padded table). None: V.
        impl: "auto" or "torch"; there is no kernel.

    Returns: a scalar, or (...) for "none"; float32 (float64 for float64 inputs). A mean over no row
        is NaN with gradients of 0; a sum of nothing is 0.
    Raises: ValueError for a wrong type, dtype, shape, device or option; NotImplementedError for
        impl="triton".

    >>> h, table = torch.randn(3, 16), torch.randn(256, 16)
    >>> float(linear_kl_div(h, table, h @ table.T).abs()) < 1e-4
    True

    Numerics: docs/numerics.md. Source: distillation at a temperature (arXiv 1503.02531).
    """
    valid = check_projection(
        input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab
    )  # fmt: skip
    leading, device = tuple(input.shape[:-1]), input.device
    require_plain(
        input=input, linear_weight=linear_weight, linear_bias=linear_bias,
        teacher_logits=teacher_logits, mask=mask,
    )  # fmt: skip
    floats = (torch.float64,) if input.dtype == torch.float64 else _checks.KERNEL_FLOATS
    _checks.require_tensor("teacher_logits", teacher_logits, (*leading, valid), floats, device)
    if mask is None:
        mask = torch.ones(leading, dtype=torch.bool, device=device)
    _checks.require_tensor("mask", mask, leading, (torch.bool,), device)
    _checks.require_choice("reduction", reduction, REDUCTIONS)
    ok = _checks.is_finite(temperature) and temperature > 0
    _checks.require_number(ok, "temperature", "a finite number > 0", temperature)
    without_kernel("linear_kl_div", impl, device)

    options = DistillOptions(float(temperature), softcap or 0.0, float(logit_scale), valid)
    rows, kept = input.reshape(-1, input.shape[-1]), mask.reshape(-1)
    teacher = teacher_logits.detach().reshape(-1, valid)
    if reduction == "none":
        loss, _ = row_losses(DIVERGENCE, options, rows, linear_weight, linear_bias, teacher, kept)
        return loss.view(leading)
    total, _ = summed_loss(DIVERGENCE, options, rows, linear_weight, linear_bias, teacher, kept)
    return total if reduction == "sum" else mean_of_counted(total, kept.sum())
