"""linear_kl_div for judging the others: an fp64 reference by rows, and plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_logprobs.reference import (
    logit_terms,
    product_terms,
    reference_logits,
    yardstick_logits,
)


def reference(
    input: Tensor,  # (..., D) fp64
    linear_weight: Tensor,  # (V, D) fp64
    teacher_logits: Tensor,  # (..., valid_vocab) fp64
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor:
    """The definition, one row after the other."""
    leading = input.shape[:-1]
    counts = torch.ones(leading, dtype=torch.bool) if mask is None else mask
    rows = input.reshape(-1, input.shape[-1])
    teachers = teacher_logits.reshape(-1, teacher_logits.shape[-1])
    losses = []
    for row, teacher, counted in zip(rows, teachers, counts.flatten(), strict=True):
        if not counted:
            losses.append(row.new_zeros(()))
            continue
        z = reference_logits(row, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
        p, q = (teacher / temperature).softmax(0), (z / temperature).softmax(0)
        some = p > 0
        losses.append(temperature**2 * (p[some] * (p[some].log() - q[some].log())).sum())
    if reduction == "none":
        return torch.stack(losses).view(leading) if losses else input.new_zeros(leading)
    total, counted = sum(losses, input.new_zeros(())), int(counts.sum())
    if reduction == "sum":
        return total
    return total / counted if counted else total * 0 + float("nan")


def terms(
    upstream: dict[str, Tensor],
    input: Tensor,
    linear_weight: Tensor,
    teacher_logits: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> dict[str, Tensor]:
    """Absolute terms of the loss and all gradients: zero where student and teacher agree."""
    # A softmax at a temperature is that of smaller logits, with a smaller cap.
    head = (None if softcap is None else softcap / temperature, logit_scale / temperature)
    bias = linear_bias
    found = logit_terms(input, linear_weight, bias, *head, valid_vocab)
    teacher = teacher_logits.reshape(found.logits.shape) / temperature
    p, log_p = teacher.softmax(1), teacher.log_softmax(1)
    kept = torch.ones(len(p), dtype=torch.bool) if mask is None else mask.flatten()
    own = torch.where(p > 0, p * log_p, 0.0).abs().sum(1)
    losses = temperature**2 * (own + (p * found.logits).sum(1) + found.lse) * kept
    up = upstream["out"].flatten().abs().expand(len(p)) * kept
    if reduction == "mean":
        up, losses = up / max(1, int(kept.sum())), losses / max(1, int(kept.sum()))
    out = losses.view(input.shape[:-1]) if reduction == "none" else losses.sum()
    of_logits = temperature**2 * (p + found.weights) * found.slope * up[:, None]
    return {"out": out} | product_terms(of_logits, input, linear_weight, bias)


def yardstick(
    input: Tensor,
    linear_weight: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    **head: Any,
) -> Tensor:
    """Plain torch: the whole logits in fp32, two log_softmax, F.kl_div."""
    head = {"linear_bias": None, "softcap": None, "logit_scale": 1.0, "valid_vocab": None} | head
    z = yardstick_logits(input, linear_weight, **head)
    given = teacher_logits.reshape(z.shape).to(z.dtype)
    logq, logp = ((x / temperature).log_softmax(1) for x in (z, given))
    rows = F.kl_div(logq, logp.exp(), reduction="none").sum(1) * temperature**2
    kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.flatten()
    rows = torch.where(kept, rows, 0.0)
    if reduction == "none":
        return rows.view(input.shape[:-1])
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()
