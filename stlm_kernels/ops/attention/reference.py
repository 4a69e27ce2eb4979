"""attention for judging the others: an fp64 oracle that loops, and stock torch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,  # (B, T, H, K) or (T, H, K) fp64
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """As q, fp64, row by row, so that nothing unseen is touched."""
    assert not dropout_p, "what is dropped is random"
    if q.dim() == 4:
        rows = [
            reference(*x, causal=causal, window=window, scale=scale, softcap=softcap)
            for x in zip(q, k, v, strict=True)
        ]
        return torch.stack(rows) if rows else torch.zeros_like(q)
    borders = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = [q[:0]]
    for start, end in pairwise(borders):
        for t in range(start, end):
            first = start if window is None else max(start, t - window + 1)
            seen = slice(first, t + 1 if causal else end)
            rows.append(_attend(q[t], k[seen], v[seen], scale, softcap)[None])
    return torch.cat([*rows, torch.zeros_like(q[borders[-1] :])])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """(H, K) of one row."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q, k) * (q.shape[1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores - scores.amax(1, keepdim=True).detach()).exp()
    return torch.einsum("hk,khd->hd", weights / weights.sum(1, keepdim=True), v)


def yardstick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What a careful user writes in stock torch: SDPA, with a mask of all scores where needed."""
    assert not dropout_p, "what is dropped is random"
    wide = torch.promote_types(q.dtype, torch.float32)
    packed = q.dim() == 3
    dtype = q.dtype
    q, k, v = ((x[None] if packed else x).to(wide).transpose(1, 2) for x in (q, k, v))
    seen = seen_mask(q.shape[2], causal, window, cu_seqlens, q.device)
    if softcap is None:
        alive = seen.any(1)
        out = F.scaled_dot_product_attention(
            q, k, v, seen | ~alive[:, None], scale=scale, enable_gqa=True
        )
        out = torch.where(alive[:, None], out, 0)
    else:
        out = _softcapped(q, k, v, seen, scale, softcap)
    out = out.transpose(1, 2).to(dtype)
    return out[0] if packed else out


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num() @ v


def seen_mask(
    length: int,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(T, T) bool: True where the row sees the key."""
    rows = torch.arange(length, device=device)
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    if causal:
        seen = rows[:, None] >= rows
    if window is not None:
        seen = seen & (rows[:, None] - rows < window)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.long(), rows, right=True)
        seen = seen & (document[:, None] == document) & (rows < cu_seqlens[-1])
    return seen
