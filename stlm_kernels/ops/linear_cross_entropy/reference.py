"""linear_cross_entropy for judging the others: an fp64 reference by rows, and plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..linear_logprobs.reference import (
    kept_targets,
    logit_terms,
    product_terms,
    reference_logits,
    yardstick_logits,
)

LOGITS = 1 << 29
"""Formed at a time by the yardstick: 2 GiB in fp32."""


def reference(
    input: Tensor,  # (..., D) fp64
    linear_weight: Tensor,  # (V, D) fp64
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,  # (V,) fp64
    return_lse: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, one row after the other."""
    losses, lses, counted = [], [], 0.0
    classes = torch.ones(linear_weight.shape[0]) if weight is None else weight
    classes = classes.double()[:valid_vocab]
    for row, wanted in zip(input.reshape(-1, input.shape[-1]), target.flatten(), strict=True):
        if ignore_index is not None and int(wanted) == ignore_index:
            losses.append(row.new_zeros(()))
            lses.append(row.new_zeros(()))
            continue
        counted += float(classes[int(wanted)])
        z = reference_logits(row, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
        lse = z.exp().sum().log()
        smooth = (classes * (lse - z)).mean()
        hard = classes[int(wanted)] * (lse - z[int(wanted)])
        losses.append((1 - label_smoothing) * hard + label_smoothing * smooth + z_loss * lse**2)
        lses.append(lse)
    each, lse = (
        torch.stack(xs).view(target.shape) if xs else input.new_zeros(target.shape)
        for xs in (losses, lses)
    )
    loss = each if reduction == "none" else sum(losses, input.new_zeros(()))
    if reduction == "mean":
        loss = loss / counted if counted else loss * 0 + float("nan")
    return (loss, lse) if return_lse else loss


def terms(
    upstream: dict[str, Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_lse: bool = False,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **head: Any,
) -> dict[str, Tensor]:
    """Absolute terms of the loss and all gradients: zero for a row that is sure of its target."""
    found = logit_terms(input, linear_weight, linear_bias, **head)
    kept, wanted = kept_targets(target, ignore_index)
    chosen = F.one_hot(wanted, found.logits.shape[1])
    classes = torch.ones(linear_weight.shape[0]) if weight is None else weight
    classes = classes.double()[: chosen.shape[1]]
    share = ((1 - label_smoothing) * chosen + label_smoothing / chosen.shape[1]) * classes
    losses = share.sum(1) * found.lse + (share * found.logits).sum(1)
    losses = (losses + z_loss * found.lse.square()) * kept
    up, up_lse = upstream["out0" if return_lse else "out"].flatten().abs(), torch.zeros(1)
    if return_lse:
        up_lse = upstream["out1"].flatten().abs()
    if reduction == "mean":
        counted = float((classes[wanted] * kept).sum()) or 1.0
        up, losses = up / counted, losses / counted
    of_lse = up * (share.sum(1) + 2 * z_loss * found.lse) + up_lse
    of_logits = up[:, None] * share + of_lse[:, None] * found.weights
    of_logits = of_logits * found.slope * kept[:, None]
    out = losses.view(target.shape) if reduction == "none" else losses.sum()
    products = product_terms(of_logits, input, linear_weight, linear_bias)
    return {"out0" if return_lse else "out": out} | products


def yardstick(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    return_lse: bool = False,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **head: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch: logits in fp32, F.cross_entropy, and the z-loss by hand.

    Rows whose logits would not fit go by blocks, which the backward forms again.
    """
    head = {"linear_bias": None, "softcap": None, "logit_scale": 1.0, "valid_vocab": None} | head
    wide = torch.promote_types(input.dtype, torch.float32)
    # Widened once, so that the blocks add up their gradients in fp32.
    table = linear_weight.to(input.dtype).to(wide)
    if head["linear_bias"] is not None:
        head["linear_bias"] = head["linear_bias"].to(wide)
    rows, wanted = input.reshape(-1, input.shape[-1]).to(wide), target.long().flatten()
    kept = wanted != (-(2**63) if ignore_index is None else ignore_index)
    wanted = torch.where(kept, wanted, -100)
    classes = None if weight is None else weight[: head["valid_vocab"]].to(wide)
    options: dict[str, Any] = {"weight": classes, "label_smoothing": label_smoothing}

    def losses(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        z = yardstick_logits(rows, table, **head)
        lse = torch.where(wanted != -100, z.logsumexp(1), 0.0)
        loss = F.cross_entropy(z, wanted, reduction="none", **options)
        return loss + z_loss * lse.square(), lse

    count = max(1, LOGITS // table.shape[0])
    if rows.shape[0] <= count:
        loss, lse = losses(rows, wanted)
    else:
        blocks = zip(rows.split(count), wanted.split(count), strict=True)
        found = [checkpoint(losses, *block, use_reentrant=False) for block in blocks]
        loss, lse = (torch.cat(each) for each in zip(*found, strict=True))
    if reduction == "none":
        loss = loss.view(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        counted = kept if classes is None else classes[wanted[kept]]
        loss = loss.sum() / counted.sum()
    return (loss, lse.view(target.shape)) if return_lse else loss
