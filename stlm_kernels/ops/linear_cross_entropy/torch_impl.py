"""The sum of row losses in aten ops, its gradients formed chunk by chunk in the forward.

With a scalar loss the gradients of all rows are known up to one factor, so each chunk of logits is
formed once, used for the loss and both gradients while it is in the cache, and forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._sharding import SUM, from_own_part, is_dtensor, own_part
from ..linear_logprobs.torch_impl import (
    Gradients,
    Objective,
    chunks_of,
    plain_losses,
    recorded_backward,
    widened,
)


def summed_loss(
    objective: Objective,
    options: Any,
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    *given: Tensor,  # (N, ...)
) -> Tensor:
    """0-d sum of the row losses in fp32 (fp64 for fp64 rows)."""
    if is_dtensor(rows):
        total = summed_loss(objective, options, *own_part(rows, weight, bias, *given))
        return from_own_part(total, SUM, rows)
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    # The operands are rounded; autocast would round the logits as well.
    with _checks.without_autocast(rows):
        if _checks.inside_torch_func():
            return plain_losses(objective, options, rows, weight, bias, *given)[0].sum()
        recorded, leaves = torch.is_grad_enabled(), (rows, weight, bias)
        wants = tuple(recorded and x is not None and x.requires_grad for x in leaves)
        return _SummedLoss.apply(objective, options, wants, *leaves, given)


class _SummedLoss(torch.autograd.Function):
    """The gradients are kept from the forward; the backward only scales them, out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        options: Any,
        wants: tuple[bool, ...],
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: tuple[Tensor, ...],  # dynamo counts parameters, and a starred one as one
    ) -> Tensor:
        leaves = (rows, weight, bias)
        grads, total = Gradients(rows, weight, bias, wants), rows.new_zeros(())
        per_row = objective.prepare(options, *given)
        for part, out in chunks_of(rows, options.valid_vocab):
            total += grads.add_chunk(objective, options, part, *leaves, *per_row, out=out).sum()
        ctx.objective, ctx.options = objective, options
        ctx.save_for_backward(*leaves, *given, grads.rows, grads.weight, grads.bias)
        return _checks.as_output(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, drows, dweight, dbias = ctx.saved_tensors
        if torch.is_grad_enabled():
            each = (grads[0].expand(arguments[0].shape[0]),)
            with _checks.without_autocast(arguments[0]):
                found = recorded_backward(ctx.objective, ctx.options, each, *arguments)
        else:
            found = [None if x is None else x * grads[0] for x in (drows, dweight, dbias)]
        return None, None, None, *found, None
