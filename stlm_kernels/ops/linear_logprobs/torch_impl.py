"""Row losses in aten ops, in chunks of rows, so that no (N, V) tensor ever exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ..._rounding import rounded

if TYPE_CHECKING:
    from .op import RowOptions

CHUNK_ELEMENTS = 1 << 20
"""Logits formed at a time: 4 MB in fp32 stay in a core's cache between the passes over them."""
LEAST_ROWS = 256
"""Rows below which the matrix products of a large vocabulary lose their efficiency."""


def row_losses(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) in fp32 (fp64 for fp64 rows)."""
    rows, weight, bias = widened(rows, weight, bias, options.valid_vocab)
    compute = plain_row_losses if _checks.inside_torch_func() else _RowLosses.apply
    # The operands are rounded; autocast would round the logits as well.
    with torch.autocast(rows.device.type, enabled=False):
        return compute(rows, weight, targets, bias, options)


def widened(
    rows: Tensor, weight: Tensor, bias: Tensor | None, valid: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands as the loss sees them: rounded to the compute dtype, held in fp32 or fp64.

    The products then accumulate in fp32 and their results are never rounded to 16 bits.
    """
    dtype = _checks.output_dtype(rows)
    wide = torch.promote_types(dtype, torch.float32)
    rows, weight = (rounded(x, dtype, wide) for x in (rows, weight[:valid]))
    return rows, weight, None if bias is None else bias[:valid].to(wide)


class Chunk(NamedTuple):
    """What a chunk of rows gives on the way to its losses."""

    inputs: Tensor  # (n, D) rows, zero where ignored: a NaN there must not spread
    logits: Tensor  # (n, V) after scale and cap
    logp: Tensor  # (n, V) log-softmax
    loss: Tensor  # (n,)
    lse: Tensor  # (n,)


def form_chunk(
    rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: RowOptions
) -> Chunk:
    """Logits and losses of some rows, from ops that torch differentiates any number of times."""
    kept = targets.long() != options.ignore_index
    index, bad = _safe_targets(targets, kept, options.valid_vocab)
    every_row_counts = _checks.values_visible(targets) and bool(kept.all())
    inputs = rows if every_row_counts else torch.where(kept[:, None], rows, 0)
    logits = F.linear(inputs, weight, bias)
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logp = logits.log_softmax(1)
    logprob = logp.gather(1, index)[:, 0]
    lse = logits.gather(1, index)[:, 0] - logprob
    loss = -logprob
    if options.label_smoothing:
        loss = torch.lerp(loss, -logp.mean(1), options.label_smoothing)
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    loss = torch.where(kept, loss.masked_fill(bad, float("nan")), 0)
    return Chunk(inputs, logits, logp, loss, torch.where(kept, lse, 0))


def plain_row_losses(
    rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of all rows at once, for those who differentiate twice or transform."""
    chunk = form_chunk(rows, weight, targets, bias, options)
    return chunk.loss, chunk.lse


def _safe_targets(targets: Tensor, kept: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """(N, 1) indices that address no memory out of bounds, and which rows' targets are bad."""
    wide = targets.long()
    bad = kept & ((wide < 0) | (wide >= valid))
    return torch.where(kept & ~bad, wide, 0)[:, None], bad


def chunk_rows(vocab: int) -> int:
    return max(LEAST_ROWS, CHUNK_ELEMENTS // vocab)


def dlogits(
    chunk: Chunk,  # its logp is overwritten with the result
    targets: Tensor,  # (n,)
    dloss: Tensor,  # (n,)
    dlse: Tensor | None,  # (n,)
    options: RowOptions,
) -> Tensor:
    """(n, V) gradient of the products before scale and cap."""
    kept = targets.long() != options.ignore_index
    index, bad = _safe_targets(targets, kept, options.valid_vocab)
    dloss = torch.where(kept, dloss, 0).masked_fill(bad, float("nan"))[:, None]
    slope = dloss
    if options.z_loss:
        slope = slope * (1 + 2 * options.z_loss * chunk.lse[:, None])
    if dlse is not None:
        slope = slope + torch.where(kept, dlse, 0)[:, None]
    grad = chunk.logp.exp_().mul_(slope)
    if options.label_smoothing:
        grad.sub_(dloss * (options.label_smoothing / options.valid_vocab))
    grad.scatter_add_(1, index, dloss * (options.label_smoothing - 1))
    if options.softcap:
        grad.mul_(1 - (chunk.logits / options.softcap).square())
    return grad.mul_(options.logit_scale) if options.logit_scale != 1.0 else grad


def add_gradients(
    chunk: Chunk,
    grad: Tensor,  # (n, V)
    weight: Tensor,
    drows: Tensor | None,  # (n, D), written
    dweight: Tensor | None,  # (V, D), added to
    dbias: Tensor | None,  # (V,), added to
) -> None:
    """What a chunk's gradient of the logits means for rows, weight and bias."""
    if drows is not None:
        torch.mm(grad, weight, out=drows)
    if dweight is not None:
        dweight.addmm_(grad.t(), chunk.inputs)
    if dbias is not None:
        dbias += grad.sum(0)


class _RowLosses(torch.autograd.Function):
    """Row losses whose backward forms the logits again, chunk by chunk."""

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: RowOptions
    ) -> tuple[Tensor, Tensor]:
        step = chunk_rows(options.valid_vocab)
        parts = [
            plain_row_losses(part, weight, target, bias, options)
            for part, target in zip(rows.split(step), targets.split(step), strict=True)
        ]
        loss, lse = zip(*parts, strict=True)
        return torch.cat(loss), torch.cat(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, weight, targets, bias, ctx.options = inputs
        ctx.save_for_backward(rows, weight, targets, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, targets, bias = ctx.saved_tensors
        wants = tuple(ctx.needs_input_grad[i] for i in (0, 1, 3))
        derive = _recorded_backward if torch.is_grad_enabled() else _backward
        drows, dweight, dbias = derive(grads, rows, weight, targets, bias, wants, ctx.options)
        return drows, dweight, None, dbias, None


def _recorded_backward(
    grads: tuple[Tensor, ...],
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wants: tuple[bool, bool, bool],
    options: RowOptions,
) -> list[Tensor | None]:
    """The gradients through autograd, for somebody who differentiates them again."""
    outputs = plain_row_losses(rows, weight, targets, bias, options)
    operands = zip((rows, weight, bias), wants, strict=True)
    leaves = [x for x, wanted in operands if wanted and x is not None]
    found = iter(
        torch.autograd.grad(outputs, leaves, grads, create_graph=True, materialize_grads=True)
    )
    return [next(found) if wanted else None for wanted in wants]


def _backward(
    grads: tuple[Tensor, ...],
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wants: tuple[bool, bool, bool],
    options: RowOptions,
) -> list[Tensor | None]:
    drows = torch.empty_like(rows) if wants[0] else None
    dweight = torch.zeros_like(weight) if wants[1] else None
    dbias = torch.zeros_like(bias) if wants[2] and bias is not None else None
    step = chunk_rows(options.valid_vocab)
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        chunk = form_chunk(rows[part], weight, targets[part], bias, options)
        grad = dlogits(chunk, targets[part], grads[0][part], grads[1][part], options)
        add_gradients(chunk, grad, weight, None if drows is None else drows[part], dweight, dbias)
    return [drows, dweight, dbias]
