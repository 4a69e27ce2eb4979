"""Losses of rows in aten ops, in chunks of rows, so that no (N, V) tensor ever exists.

Chunks and their autograd are one thing, the formula of a loss another: `Objective` holds the
latter. With a sum of losses the gradients of all rows are known up to one factor, so each chunk of
logits is formed once, used for the loss and both gradients while it is in the cache, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import runtime
from .._sharding import ROW, SUM, from_own_part, is_dtensor, own_part
from .._torch import autograd
from .._torch.function import Function
from .projection import widened

THREAD_ELEMENTS = 1 << 17
"""Logits formed at a time by each thread of a CPU: half a megabyte in fp32 stays in a core's own
cache between the passes over them."""
CHUNK_ELEMENTS = 1 << 20
"""Elements of a chunk where each costs a launch, or is compiled anew."""
WIDE, ALIGNED = 512, 16
"""Products of more columns than the first take longer on a CPU where their rows do not begin at
multiples of the second."""
LEAST_ROWS = 512
"""Rows below which the matrix products of a large vocabulary lose their efficiency."""


class Objective(NamedTuple):
    """Rule for losses from rows, and for the gradient of the logits from those of the losses.

    `per_row` stands for what each row is judged by, tensors with an entry for each row or None,
    and `out` for memory (n, at least V) that the logits may take, and what is made of them: with
    it autograd records nothing, and columns from V on mean nothing.
    """

    prepare: Callable[..., tuple[Tensor | None, ...]]  # (options, *given) -> per_row of all rows
    form: Callable[..., Any]  # (rows, weight, bias, options, *per_row, out=None) -> chunk
    dlogits: Callable[..., Tensor]  # (chunk, dloss, dlse, options, *per_row) -> (n, V...)


def row_losses(
    objective: Objective,
    options: Any,
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    *given: Tensor,  # (N, ...), or of the columns (V,)
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) in fp32 (fp64 for fp64 rows)."""
    if is_dtensor(rows):
        loss, lse = row_losses(objective, options, *own_part(rows, weight, bias, *given))
        return from_own_part(loss, ROW, rows), from_own_part(lse, ROW, rows)
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    # The operands are cast; autocast would cast the logits as well.
    with runtime.without_autocast(rows):
        if runtime.needs_composition(rows, weight, bias):
            return plain_losses(objective, options, rows, weight, bias, *given)
        return _RowLosses.apply(objective, options, rows, weight, bias, given)


def plain_losses(
    objective: Objective,
    options: Any,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *given: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of all rows at once, for second derivatives and transforms."""
    per_row = objective.prepare(options, *given)
    chunk = objective.form(rows, weight, bias, options, *per_row)
    return chunk.loss, chunk.lse


class Gradients:
    """Gradients of rows, weight and bias, added up chunk by chunk; None where not required."""

    def __init__(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wants: tuple[bool, ...]
    ) -> None:
        self.rows = torch.empty_like(rows) if wants[0] else None
        self.weight = torch.zeros_like(weight) if wants[1] else None
        self.bias = torch.zeros_like(bias) if wants[2] and bias is not None else None

    def add_chunk(
        self,
        objective: Objective,
        options: Any,
        part: slice,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *per_row: Tensor | None,
        out: Tensor,  # (n, at least V)
        upstream: tuple[Tensor, Tensor] | None = None,
        lse: Tensor | None = None,  # (n,) to be written
    ) -> Tensor:
        """Add what the rows of `part` give, and return their losses; upstream None: their sum.

        A function of its own, so that nothing of a chunk outlives it into the next one.
        """
        own = part_of(per_row, part)
        chunk = objective.form(rows[part], weight, bias, options, *own, out=out)
        if lse is not None:
            lse.copy_(chunk.lse)
        if self.rows is not None or self.weight is not None or self.bias is not None:
            dloss, dlse = torch.ones_like(chunk.loss), None
            if upstream is not None:
                dloss, dlse = upstream[0][part], upstream[1][part]
            grad = objective.dlogits(chunk, dloss, dlse, options, *own)
            self._add(part, chunk.inputs, grad, weight)
        return chunk.loss

    def _add(self, part: slice, inputs: Tensor, grad: Tensor, weight: Tensor) -> None:
        """Gradients of a chunk's operands from the (n, V...) gradient of its products."""
        grad = grad[:, : weight.shape[0]]
        if self.rows is not None:
            torch.mm(grad, weight, out=self.rows[part])
        if self.weight is not None:
            self.weight.addmm_(grad.t(), inputs)
        if self.bias is not None:
            self.bias += grad.sum(0)


def chunks_of(rows: Tensor, vocab: int) -> Iterator[tuple[slice, Tensor]]:
    """The runs of rows whose logits exist at a time, and the memory that all of them share."""
    elements, pitch = CHUNK_ELEMENTS, vocab
    if rows.is_cpu and not torch.compiler.is_compiling():
        elements = THREAD_ELEMENTS * torch.get_num_threads()
        pitch = vocab if vocab <= WIDE else -(-vocab // ALIGNED) * ALIGNED
    count, step = rows.shape[0], max(LEAST_ROWS, elements // vocab)
    shared = rows.new_empty(min(step, count), pitch)
    for first in range(0, count, step):
        last = min(first + step, count)
        yield slice(first, last), shared[: last - first]


def part_of(per_row: tuple[Tensor | None, ...], part: slice) -> list[Tensor | None]:
    return [None if x is None else x[part] for x in per_row]


class _RowLosses(Function):
    """Row losses whose backward forms the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        objective: Objective,
        options: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: tuple[Tensor, ...],  # dynamo counts parameters, and a starred one as one
    ) -> tuple[Tensor, Tensor]:
        per_row = objective.prepare(options, *given)
        loss, lse = rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
        for part, out in chunks_of(rows, options.valid_vocab):
            own = part_of(per_row, part)
            chunk = objective.form(rows[part], weight, bias, options, *own, out=out)
            loss[part], lse[part] = chunk.loss, chunk.lse
        return loss, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.objective, ctx.options, *leaves, given = inputs
        ctx.save_for_backward(*leaves, *given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wants = tuple(ctx.needs_input_grad[2:5])
        arguments = (grads, *ctx.saved_tensors)
        # A loop may call it where autocast still rules.
        with runtime.without_autocast(ctx.saved_tensors[0]):
            if autograd.is_needed(*grads):
                found = differentiable_backward(ctx.objective, ctx.options, *arguments)
            else:
                found = chunked_backward(ctx.objective, ctx.options, wants, *arguments)
        return None, None, *found, None


def differentiable_backward(
    objective: Objective,
    options: Any,
    grads: tuple[Tensor, ...],  # of the losses, and of the lse if it was given out
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *given: Tensor,
) -> list[Tensor | None]:
    """The gradients through autograd, where the chunked ones cannot be differentiated."""

    def losses(*leaves: Any) -> tuple[Tensor, Tensor]:
        return plain_losses(objective, options, *leaves, *given)

    return autograd.gradients(losses, (rows, weight, bias), grads)


def chunked_backward(
    objective: Objective,
    options: Any,
    wants: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *given: Tensor,
) -> list[Tensor | None]:
    total, leaves = Gradients(rows, weight, bias, wants), (rows, weight, bias)
    upstream, per_row = (grads[0], grads[1]), objective.prepare(options, *given)
    for part, out in chunks_of(rows, options.valid_vocab):
        total.add_chunk(objective, options, part, *leaves, *per_row, out=out, upstream=upstream)
    return [total.rows, total.weight, total.bias]


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
