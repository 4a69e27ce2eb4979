"""Row losses for judging the others: an fp64 oracle from the definition, and stock torch."""

from __future__ import annotations

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


def stock_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
) -> Tensor:
    """(N, valid_vocab) logits as a careful user forms them: rounded operands, fp32 products."""
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
    """Stock torch: the whole (N, V) logits in fp32, log_softmax, gather."""
    z = stock_logits(input, linear_weight, linear_bias, softcap, logit_scale, valid_vocab)
    wanted = target.long().flatten()
    kept = torch.ones_like(wanted, dtype=torch.bool)
    if ignore_index is not None:
        kept = wanted != ignore_index
    logprob = z.log_softmax(1).gather(1, torch.where(kept, wanted, 0)[:, None])[:, 0]
    zero = logprob.new_zeros(())
    both = torch.where(kept, logprob, zero), torch.where(kept, z.logsumexp(1), zero)
    return both[0].view(target.shape), both[1].view(target.shape)
