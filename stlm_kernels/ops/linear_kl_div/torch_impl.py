"""Divergence of rows of logits from a teacher's, in aten ops: an objective of the row losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._linear.chunked import Objective
from ..._linear.options import DistillOptions
from ..._linear.projection import counted_rows, form_logits, seen_to_count, through_cap_and_scale


class Chunk(NamedTuple):
    """Intermediate results of a chunk of rows on the way to its losses."""

    inputs: Tensor  # (n, D) rows, zero where masked: a NaN there must not spread
    logits: Tensor | None  # (n, V) of the student after scale and cap; only a cap asks for them
    logq: Tensor  # (n, V) of the student at the temperature
    p: Tensor  # (n, V) of the teacher at the temperature
    loss: Tensor  # (n,)
    lse: Tensor  # () zero: what the chunked functions give out beside a loss


def _prepare(
    options: DistillOptions, teacher: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor | None]:
    return teacher, None if seen_to_count(kept) else kept


def _form(
    rows: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    options: DistillOptions,
    teacher: Tensor,  # (n, V)
    kept: Tensor | None,  # (n,) bool
    out: Tensor | None = None,  # (n, at least V)
) -> Chunk:
    """Divergences of some rows, from ops that torch differentiates any number of times."""
    inputs, given = counted_rows(rows, kept), counted_rows(teacher, kept).to(rows.dtype)
    logits = form_logits(inputs, weight, bias, options, out)
    logq = _log_softmax(logits, options.temperature, None if options.softcap else out)
    logits, logq = logits[:, : options.valid_vocab], logq[:, : options.valid_vocab]
    # A column that the teacher rules out has no mass: 0 x log 0 is 0.
    logp = _log_softmax(given, options.temperature).clamp_min_(torch.finfo(rows.dtype).min)
    p = logp.exp()
    ratio = torch.sub(logp, logq, out=None if out is None else logp)
    if bias is not None:  # which may rule out the same column
        ratio = ratio.masked_fill(p == 0, 0)
    loss = torch.linalg.vecdot(p, ratio) * options.temperature**2
    if kept is not None:
        loss = torch.where(kept, loss, 0)
    return Chunk(inputs, logits if options.softcap else None, logq, p, loss, loss.new_zeros(()))


def _log_softmax(logits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    if temperature != 1.0:
        logits = torch.div(logits, temperature, out=out)
    return torch.log_softmax(logits, 1, out=out)


def _dlogits(
    chunk: Chunk,  # its logq is overwritten with the result
    dloss: Tensor,  # (n,)
    dlse: Tensor | None,
    options: DistillOptions,
    teacher: Tensor,
    kept: Tensor | None,  # (n,) bool
) -> Tensor:
    """(n, V) gradient of the products before scale and cap."""
    slope = (dloss if kept is None else torch.where(kept, dloss, 0)) * options.temperature
    grad = chunk.logq.exp_().sub_(chunk.p).mul_(slope[:, None])
    return through_cap_and_scale(grad, chunk.logits, options)


DIVERGENCE = Objective(_prepare, _form, _dlogits)
"""KL(teacher || student) x temperature^2."""
