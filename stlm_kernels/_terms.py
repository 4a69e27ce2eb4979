"""The absolute terms of softmax attention: gradients cancel where few keys are seen."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_terms(
    q: Tensor,  # (R, H, K) fp64
    k: Tensor,  # (S, H_kv, K)
    v: Tensor,  # (S, H_kv, K)
    upstream: Tensor,  # (R, H, K)
    seen: Tensor,  # (R, S) bool
    scale: float | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of absolute terms of the result and the gradients of q and k.

    The gradient of a score is P (dP - sum P dP): a row that sees one key takes the difference of
    two equal numbers, each a sum of K products. A mean of many values is small beside them.

    Returns:
        (R, H, K), (R, H, K) and (S, H_kv, K).
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores, slope = torch.einsum("rhd,shd->hrs", q, keys) * scale, abs(scale)
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, slope * (1 - capped.square())
    weights = scores.masked_fill(~seen, -torch.inf).softmax(2).nan_to_num()
    products = torch.einsum("rhd,shd->hrs", upstream.abs(), values.abs())
    terms = weights * (products + (weights * products).sum(2, keepdim=True)) * slope
    out = torch.einsum("hrs,shd->rhd", weights, values.abs())
    of_q = torch.einsum("hrs,shd->rhd", terms, keys.abs())
    of_k = torch.einsum("hrs,rhd->shd", terms, q.abs())
    return out, of_q, of_k.view(*k.shape[:2], group, k.shape[2]).sum(2)
