"""patch_attention for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import attention_terms


def reference(
    q: Tensor,  # (T, H, K) fp64
    k: Tensor,  # (T, H_kv, K) fp64
    v: Tensor,  # (T, H_kv, K) fp64
    cu_patchlens: Tensor,  # (P+1,)
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(T, H, K) fp64, patch by patch; causal: byte by byte, so that no later byte is touched."""
    boundaries = cu_patchlens.tolist()
    rows = [q[:0]]
    for start, end in pairwise(boundaries):
        if causal:
            for t in range(start, end):
                rows.append(_attend(q[t : t + 1], k[start : t + 1], v[start : t + 1], scale))
        else:
            rows.append(_attend(q[start:end], k[start:end], v[start:end], scale))
    return torch.cat([*rows, torch.zeros_like(q[boundaries[-1] :])])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = (scores - scores.amax(2, keepdim=True).detach()).exp() if k.shape[0] else scores
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(2, keepdim=True), v)


def terms(
    upstream: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_patchlens: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """Absolute terms of the result and the gradients of q and k: zero in a patch of one byte."""
    out, of_q, of_k = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k)
    for start, end in pairwise(cu_patchlens.tolist()):
        own = slice(start, end)
        seen = torch.ones(end - start, end - start, dtype=torch.bool)
        operands = (q[own], k[own], v[own], upstream["out"][own])
        seen = seen.tril() if causal else seen
        out[own], of_q[own], of_k[own] = attention_terms(*operands, seen, scale)
    return {"out": out, "q": of_q, "k": of_k}


def yardstick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_patchlens: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: patches of one length folded into a batch."""
    wide = torch.promote_types(q.dtype, torch.float32)
    starts, lengths = cu_patchlens[:-1].long(), cu_patchlens.diff().long()
    out = q.new_zeros(q.shape, dtype=wide)
    for length in lengths[lengths > 0].unique().tolist():
        rows = starts[lengths == length][:, None] + torch.arange(length, device=q.device)
        q_part, k_part, v_part = (x.to(wide)[rows].transpose(1, 2) for x in (q, k, v))
        part = F.scaled_dot_product_attention(
            q_part, k_part, v_part, is_causal=causal, scale=scale, enable_gqa=True
        )
        out = out.index_copy(0, rows.flatten(), part.transpose(1, 2).flatten(0, 1))
    return out.to(q.dtype)
