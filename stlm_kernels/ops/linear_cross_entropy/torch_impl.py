"""The sum of row losses in aten ops, its gradients formed chunk by chunk in the forward.

With a scalar loss the gradients of all rows are known up to one factor, so each chunk of logits is
formed once, used for the loss and both gradients while it is in the cache, and forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks
from ..linear_logprobs.torch_impl import (
    add_gradients,
    chunk_rows,
    dlogits,
    form_chunk,
    plain_row_losses,
    widened,
)

if TYPE_CHECKING:
    from ..linear_logprobs.op import RowOptions


def summed_loss(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    options: RowOptions,
) -> Tensor:
    """0-d sum of the row losses in fp32 (fp64 for fp64 rows)."""
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    # The operands are rounded; autocast would round the logits as well.
    with torch.autocast(rows.device.type, enabled=False):
        if _checks.inside_torch_func():
            return plain_row_losses(rows, weight, targets, bias, options)[0].sum()
        return _SummedLoss.apply(rows, weight, targets, bias, options, torch.is_grad_enabled())


class _SummedLoss(torch.autograd.Function):
    """The gradients are kept from the forward; the backward only scales them, out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        options: RowOptions,
        recorded: bool,
    ) -> Tensor:
        leaves = (rows, weight, bias)
        wants = [recorded and x is not None and x.requires_grad for x in leaves]
        drows = torch.empty_like(rows) if wants[0] else None
        dweight = torch.zeros_like(weight) if wants[1] else None
        dbias = torch.zeros_like(bias) if wants[2] and bias is not None else None
        total = rows.new_zeros(())
        step = chunk_rows(options.valid_vocab)
        for first in range(0, rows.shape[0], step):
            part = slice(first, first + step)
            chunk = form_chunk(rows[part], weight, targets[part], bias, options)
            total += chunk.loss.sum()
            if any(wants):
                ones = torch.ones_like(chunk.loss)
                grad = dlogits(chunk, targets[part], ones, None, options)
                out = None if drows is None else drows[part]
                add_gradients(chunk, grad, weight, out, dweight, dbias)
        ctx.options, ctx.wants = options, wants
        ctx.save_for_backward(rows, weight, targets, bias, drows, dweight, dbias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, drows, dweight, dbias = ctx.saved_tensors
        if torch.is_grad_enabled():
            drows, dweight, dbias = _recorded_backward(grads[0], arguments, ctx.wants, ctx.options)
        else:
            drows, dweight, dbias = (
                None if x is None else x * grads[0] for x in (drows, dweight, dbias)
            )
        return drows, dweight, None, dbias, None, None


def _recorded_backward(
    grad: Tensor, arguments: list[Tensor], wants: list[bool], options: RowOptions
) -> list[Tensor | None]:
    """The gradients through autograd, for somebody who differentiates them again."""
    rows, weight, targets, bias = arguments
    total = plain_row_losses(rows, weight, targets, bias, options)[0].sum()
    leaves = [x for x, wanted in zip((rows, weight, bias), wants, strict=True) if wanted]
    found = iter(torch.autograd.grad(total, leaves, grad, create_graph=True))
    return [next(found) if wanted else None for wanted in wants]
