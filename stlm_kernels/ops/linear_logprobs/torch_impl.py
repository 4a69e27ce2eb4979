"""Row losses in aten ops, in chunks of rows, so that no (N, V) tensor ever exists.

Chunks and their autograd are one thing, the formula of a loss another: `Objective` holds the
latter, so that other losses of a projection stand on the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import runtime
from ..._linear.options import RowOptions
from ..._sharding import ROW, from_own_part, is_dtensor, own_part
from ..._torch import autograd
from ..._torch.casting import cast

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


class Chunk(NamedTuple):
    """Intermediate results of a chunk of rows on the way to its losses."""

    inputs: Tensor  # (n, D) rows, zero where ignored: a NaN there must not spread
    logits: Tensor | None  # (n, V...) after scale and cap; only a cap asks for them again
    logp: Tensor  # (n, V...) log-softmax
    loss: Tensor  # (n,)
    lse: Tensor  # (n,)


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


def plain_losses(
    objective: Objective,
    options: Any,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *given: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of all rows at once, for those who differentiate twice or transform."""
    per_row = objective.prepare(options, *given)
    chunk = objective.form(rows, weight, bias, options, *per_row)
    return chunk.loss, chunk.lse


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


def _prepare(
    options: RowOptions,
    targets: Tensor,  # (N,)
    class_weight: Tensor | None = None,  # (V,)
) -> tuple[Tensor | None, ...]:
    """(N, 1) indices that address no memory out of bounds, which rows count, whose are bad.

    And with class weights what multiplies each row's log-probabilities: hard (N,) that of its
    target, spread (N, V) those of all columns, mass (N,) the sum of both.
    """
    wide = targets.long()
    kept = wide != options.ignore_index
    index, counts = wide[:, None], None
    bad: Tensor | None = None
    if not seen_to_count(kept):  # or else the public functions have seen that none is bad
        counts, bad = kept, kept & ((wide < 0) | (wide >= options.valid_vocab))
        index = torch.where(kept & ~bad, wide, 0)[:, None]
    if class_weight is None:
        return index, counts, bad, None, None, None
    classes = class_weight[: options.valid_vocab]
    classes = classes.to(torch.promote_types(classes.dtype, torch.float32))
    mass = hard = classes[index[:, 0]] * (1 - options.label_smoothing)
    spread: Tensor | None = None
    if options.label_smoothing:
        soft = classes * (options.label_smoothing / options.valid_vocab)
        spread, mass = soft.expand(len(index), -1), hard + soft.sum()
    return index, counts, bad, hard, spread, mass


def _form(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: RowOptions,
    index: Tensor,  # (n, 1) int64
    kept: Tensor | None,  # (n,) bool
    bad: Tensor | None,  # (n,) bool
    hard: Tensor | None,  # (n,)
    spread: Tensor | None,  # (n, V)
    mass: Tensor | None,  # (n,)
    out: Tensor | None = None,  # (n, at least V)
) -> Chunk:
    """Logits and losses of some rows, from ops that torch differentiates any number of times."""
    inputs = counted_rows(rows, kept)
    logits = form_logits(inputs, weight, bias, options, out)
    chosen = logits.gather(1, index)[:, 0]
    logp = torch.log_softmax(logits, 1, out=None if options.softcap else out)
    logprob = logp.gather(1, index)[:, 0]
    lse = chosen - logprob
    loss = -logprob if hard is None else -hard * logprob
    if spread is not None:
        smoothed = logp[:, : options.valid_vocab]
        if bias is not None:  # which may rule out a column: without weight it adds nothing
            smoothed = smoothed.masked_fill(spread == 0, 0)
        # All rows of spread are one; a sum over the one column serves no rows as well.
        loss = loss - (smoothed @ spread[:1].t()).sum(1)
    elif options.label_smoothing:
        average = logp[:, : options.valid_vocab].mean(1)
        loss = torch.lerp(loss, -average, options.label_smoothing)
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    if bad is not None:  # a product, as NaN put in place of the loss would leave the gradients zero
        loss = loss * torch.where(bad, float("nan"), 1.0)
    if kept is not None:
        loss, lse = torch.where(kept, loss, 0), torch.where(kept, lse, 0)
    return Chunk(inputs, logits if options.softcap else None, logp, loss, lse)


def _dlogits(
    chunk: Chunk,  # its logp is overwritten with the result
    dloss: Tensor,  # (n,)
    dlse: Tensor | None,  # (n,)
    options: RowOptions,
    index: Tensor,  # (n, 1) int64
    kept: Tensor | None,  # (n,) bool
    bad: Tensor | None,  # (n,) bool
    hard: Tensor | None,  # (n,)
    spread: Tensor | None,  # (n, V)
    mass: Tensor | None,  # (n,)
) -> Tensor:
    """(n, V...) gradient of the products before scale and cap."""
    if kept is not None:
        dloss = torch.where(kept, dloss, 0)
        dlse = None if dlse is None else torch.where(kept, dlse, 0)
    if bad is not None:
        dloss = dloss.masked_fill(bad, float("nan"))
    slope = dloss if mass is None else dloss * mass
    if options.z_loss:
        slope = slope + dloss * (2 * options.z_loss * chunk.lse)
    if dlse is not None:
        slope = slope + dlse
    grad = chunk.logp.exp_().mul_(slope[:, None])
    if spread is not None:
        grad[:, : options.valid_vocab].addcmul_(dloss[:, None], spread, value=-1)
    elif options.label_smoothing:
        grad.sub_(dloss[:, None] * (options.label_smoothing / options.valid_vocab))
    picked = (options.label_smoothing - 1) if hard is None else -hard[:, None]
    grad.scatter_add_(1, index, dloss[:, None] * picked)
    return through_cap_and_scale(grad, chunk.logits, options)


TARGETS = Objective(_prepare, _form, _dlogits)
"""Cross entropy with targets."""


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


class _RowLosses(torch.autograd.Function):
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
    """The gradients through autograd, for whom the chunked ones are not."""

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
