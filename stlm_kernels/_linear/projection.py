"""Logits in aten ops: operands, scale and cap, and the rows that count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from .._torch.casting import cast


def widened(
    rows: Tensor, weight: Tensor, bias: Tensor | None, valid: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands as the loss sees them: cast to the compute dtype, held in fp32 or fp64.

    The products then accumulate in fp32 and their results are never cast to 16 bits.
    """
    dtype = runtime.compute_dtype(rows)
    wide = torch.promote_types(dtype, torch.float32)
    if valid < weight.shape[0]:
        weight, bias = weight[:valid], None if bias is None else bias[:valid]
    bias = None if bias is None else bias.to(wide)
    return cast(rows, dtype, wide), cast(weight, dtype, wide), bias


def form_logits(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, options: Any, out: Tensor | None = None
) -> Tensor:
    """(n, V) logits after scale and cap; beside them, where `out` is wider, columns of -inf."""
    vocab, whole = weight.shape[0], out
    if whole is not None and whole.shape[1] > vocab:
        whole[:, vocab:] = -torch.inf
        out = whole[:, :vocab]
    if bias is None:
        logits = torch.mm(inputs, weight.t(), out=out)
    else:
        logits = torch.addmm(bias, inputs, weight.t(), out=out)
    if options.logit_scale != 1.0:
        logits = torch.mul(logits, options.logit_scale, out=out)
    if options.softcap:
        bounded = torch.tanh(torch.div(logits, options.softcap, out=out), out=out)
        logits = torch.mul(bounded, options.softcap, out=out)
    return logits if whole is None else whole


def through_cap_and_scale(grad: Tensor, logits: Tensor | None, options: Any) -> Tensor:
    """The gradient of the logits, overwritten with that of the products beneath them."""
    if logits is not None and options.softcap:
        grad.mul_(1 - (logits / options.softcap).square())
    return grad.mul_(options.logit_scale) if options.logit_scale != 1.0 else grad


def seen_to_count(kept: Tensor) -> bool:
    """Return whether all rows count and that is visible, so that nothing need be done about it."""
    return runtime.values_visible(kept) and bool(kept.all())


def counted_rows(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Rows with zeros where they do not count."""
    return rows if kept is None else torch.where(kept[:, None], rows, 0)
