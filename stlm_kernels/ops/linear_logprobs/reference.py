"""Row losses for judging the others: an fp64 reference from the definition, and plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    input: Tensor,  # (..., D) fp64
    linear_weight: Tensor,  # (V, D) fp64
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob, lse) in fp64, one row after the other."""
    logprobs, lses = [], []
    for row, wanted in zip(input.reshape(-1, input.shape[-1]), target.flatten(), strict=True):
        if ignore_index is not None and int(wanted) == ignore_index:
            logprobs.append(row.new_zeros(()))
            lses.append(row.new_zeros(()))
            continue
        z = reference_logits(row, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
        lses.append(z.exp().sum().log())
        logprobs.append(z[int(wanted)] - lses[-1])
    empty = input.new_zeros(target.shape)
    if not logprobs:
        return empty, empty
    return torch.stack(logprobs).view(target.shape), torch.stack(lses).view(target.shape)


def reference_logits(
    row: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> Tensor:
    """(valid_vocab,) logits of one row."""
    z = linear_weight @ row
    z = z if linear_bias is None else z + linear_bias
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z[:valid_vocab]


class Terms(NamedTuple):
    """Sums of the absolute terms of rows of logits."""

    weights: Tensor  # (N, valid_vocab), the softmax
    logits: Tensor  # (N, valid_vocab), of each logit
    lse: Tensor  # (N,), of sum(weights x logits) + entropy
    slope: Tensor  # (N, valid_vocab), of a logit by its product


def logit_terms(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> Terms:
    """Absolute terms of logits and of their log-sum-exp."""
    z = yardstick_logits(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    bias = None if linear_bias is None else linear_bias.abs()
    operands = (input.abs(), linear_weight.abs(), bias)
    terms = yardstick_logits(*operands, None, abs(logit_scale), valid_vocab)
    slope = torch.full_like(z, abs(logit_scale))
    if softcap is not None:
        slope = slope * (1 - (z / softcap).square())
        terms = terms.clamp(max=softcap)
    weights = z.softmax(1)
    entropy = -torch.special.xlogy(weights, weights).sum(1)
    return Terms(weights, terms, (weights * terms).sum(1) + entropy, slope)


def product_terms(
    of_logits: Tensor,  # (N, valid_vocab), absolute terms of the gradient of the logits
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
) -> dict[str, Tensor]:
    """Absolute terms of the gradients that follow from those of the logits."""
    rows, valid = input.reshape(-1, input.shape[-1]).abs(), of_logits.shape[1]
    of_weight, of_bias = (
        torch.zeros_like(linear_weight),
        linear_weight.new_zeros(linear_weight.shape[0]),
    )
    of_weight[:valid], of_bias[:valid] = of_logits.T @ rows, of_logits.sum(0)
    of_input = (of_logits @ linear_weight[:valid].abs()).view(input.shape)
    found = {"input": of_input, "linear_weight": of_weight}
    return found if linear_bias is None else found | {"linear_bias": of_bias}


def terms(
    upstream: dict[str, Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    **head: Any,
) -> dict[str, Tensor]:
    """Absolute terms of all but lse; those of a row that is sure of its target are zero."""
    found = logit_terms(input, linear_weight, linear_bias, **head)
    kept, wanted = kept_targets(target, ignore_index)
    chosen = F.one_hot(wanted, found.logits.shape[1])
    up, up_lse = (upstream[name].flatten().abs()[:, None] for name in ("out0", "out1"))
    of_logits = (
        (up * (chosen + found.weights) + up_lse * found.weights) * found.slope * kept[:, None]
    )
    out = ((chosen * found.logits).sum(1) + found.lse) * kept
    return {"out0": out.view(target.shape)} | product_terms(
        of_logits, input, linear_weight, linear_bias
    )


def kept_targets(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Mask of the rows that count, and their targets: 0 where they do not."""
    wanted = target.flatten().long()
    kept = torch.ones_like(wanted, dtype=torch.bool)
    if ignore_index is not None:
        kept = wanted != ignore_index
    return kept, torch.where(kept, wanted, 0)


def yardstick_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> Tensor:
    """(N, valid_vocab) logits as a careful user forms them: operands cast, fp32 products."""
    wide = torch.promote_types(input.dtype, torch.float32)
    rows = input.reshape(-1, input.shape[-1]).to(wide)
    bias = None if linear_bias is None else linear_bias.to(wide)
    z = F.linear(rows, linear_weight.to(input.dtype).to(wide), bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z[:, :valid_vocab]


def yardstick(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain torch: the whole (N, V) logits in fp32, log_softmax, gather."""
    z = yardstick_logits(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    wanted = target.long().flatten()
    kept = torch.ones_like(wanted, dtype=torch.bool)
    if ignore_index is not None:
        kept = wanted != ignore_index
    logprob = z.log_softmax(1).gather(1, torch.where(kept, wanted, 0)[:, None])[:, 0]
    zero = logprob.new_zeros(())
    both = torch.where(kept, logprob, zero), torch.where(kept, z.logsumexp(1), zero)
    return both[0].view(target.shape), both[1].view(target.shape)
