"""Cross entropy with targets in aten ops: an objective of the chunked losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._linear.chunked import Objective
from ..._linear.options import RowOptions
from ..._linear.projection import counted_rows, form_logits, seen_to_count, through_cap_and_scale


class Chunk(NamedTuple):
    """Intermediate results of a chunk of rows on the way to its losses."""

    inputs: Tensor  # (n, D) rows, zero where ignored: a NaN there must not spread
    logits: Tensor | None  # (n, V...) after scale and cap; only a cap asks for them again
    logp: Tensor  # (n, V...) log-softmax
    loss: Tensor  # (n,)
    lse: Tensor  # (n,)


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
