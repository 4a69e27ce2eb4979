"""The sum of row losses in aten ops, its gradients formed chunk by chunk in the forward.

With a scalar loss the gradients of all rows are known up to one factor, so each chunk of logits is
formed once, used for the loss and both gradients while it is in the cache, and forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import runtime
from ..._sharding import ROW, SUM, from_own_part, is_dtensor, own_part
from ..._torch import autograd
from ..linear_logprobs.torch_impl import (
    Gradients,
    Objective,
    chunked_backward,
    chunks_of,
    differentiable_backward,
    plain_losses,
    widened,
)


def summed_loss(
    objective: Objective,
    options: Any,
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    *given: Tensor,  # (N, ...), or of the columns (V,)
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """0-d sum of the row losses, and the lse (N,) if asked; in fp32 (fp64 for fp64 rows)."""
    if is_dtensor(rows):
        own = own_part(rows, weight, bias, *given)
        total, lse = summed_loss(objective, options, *own, with_lse=with_lse)
        lse = None if lse is None else from_own_part(lse, ROW, rows)
        return from_own_part(total, SUM, rows), lse
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    # The operands are cast; autocast would cast the logits as well.
    with runtime.without_autocast(rows):
        if runtime.needs_composition(rows, weight, bias):
            loss, lse = plain_losses(objective, options, rows, weight, bias, *given)
            return loss.sum(), lse
        grad_enabled, leaves = torch.is_grad_enabled(), (rows, weight, bias)
        wants = tuple(grad_enabled and x is not None and x.requires_grad for x in leaves)
        found = _SummedLoss.apply(objective, options, wants, with_lse, *leaves, given)
        return found if with_lse else (found, None)


class _SummedLoss(torch.autograd.Function):
    """The gradients are kept from the forward; the backward only scales them, out of place.

    Those of the lse are not: where one is asked for, the backward forms the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        options: Any,
        wants: tuple[bool, ...],
        with_lse: bool,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: tuple[Tensor, ...],  # dynamo counts parameters, and a starred one as one
    ) -> Tensor | tuple[Tensor, Tensor]:
        leaves = (rows, weight, bias)
        grads, total = Gradients(rows, weight, bias, wants), rows.new_zeros(())
        lse = rows.new_zeros(rows.shape[0]) if with_lse else None
        per_row = objective.prepare(options, *given)
        for part, out in chunks_of(rows, options.valid_vocab):
            own_lse = None if lse is None else lse[part]
            loss = grads.add_chunk(
                objective, options, part, *leaves, *per_row, out=out, lse=own_lse
            )
            total += loss.sum()
        ctx.objective, ctx.options, ctx.wants = objective, options, wants
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*leaves, *given, grads.rows, grads.weight, grads.bias)
        total = autograd.as_output(total)
        return total if lse is None else (total, autograd.as_output(lse))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, drows, dweight, dbias = ctx.saved_tensors
        dtotal, dlse = (*grads, None)[:2]
        found: list[Tensor | None] = [None] * 3
        if dtotal is dlse is None:
            pass  # autograd.gradcheck asks with neither
        elif dlse is None and not torch.is_grad_enabled():
            found = [None if x is None else x * dtotal for x in (drows, dweight, dbias)]
        else:
            found = _again(ctx, dtotal, dlse, *arguments)
        return None, None, None, None, *found, None


def _again(
    ctx: Any, dtotal: Tensor | None, dlse: Tensor | None, *arguments: Any
) -> list[Tensor | None]:
    """The gradients from the logits formed again, of the sum and of each lse."""
    rows = arguments[0]
    each = rows.new_zeros(()) if dtotal is None else dtotal
    grads = (each.expand(rows.shape[0]), *(() if dlse is None else (dlse,)))
    with runtime.without_autocast(rows):
        if dlse is None or autograd.is_needed(*grads):
            return differentiable_backward(ctx.objective, ctx.options, grads, *arguments)
        return chunked_backward(ctx.objective, ctx.options, ctx.wants, grads, *arguments)
