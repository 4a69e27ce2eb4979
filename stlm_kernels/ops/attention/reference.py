"""attention for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Window = int | tuple[int | None, int | None] | None

BLOCK = 2048
"""Rows whose scores the yardstick forms at a time."""


def reference(
    q: Tensor,  # (B, T, H, K) or (T, H, K) fp64
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: Window = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention in fp64, row by row, so that nothing unseen is touched."""
    assert not dropout_p, "what is dropped is random"
    if q.dim() == 4:
        rows = [
            reference(*x, causal=causal, window=window, scale=scale, softcap=softcap)
            for x in zip(q, k, v, strict=True)
        ]
        return torch.stack(rows) if rows else torch.zeros_like(q)
    left, right = sides(causal, window)
    boundaries = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    keys = [0, k.shape[0]] if cu_seqlens is None else boundaries
    if cu_seqlens_k is not None:
        keys = cu_seqlens_k.tolist()
    rows = [q[:0]]
    for (start, end), (low, high) in zip(pairwise(boundaries), pairwise(keys), strict=True):
        for t in range(start, end):
            place = t + high - end
            first = low if left is None else max(low, place - left)
            last = high if right is None else min(high, place + right + 1)
            if last > first:
                seen = slice(first, last)
                rows.append(_attend(q[t], k[seen], v[seen], scale, softcap)[None])
            else:
                rows.append(torch.zeros_like(q[t : t + 1]))
    return torch.cat([*rows, torch.zeros_like(q[boundaries[-1] :])])


def sides(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """Number of keys that a row sees before its own and behind it; None: all."""
    left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
    left, right = (None if x == -1 else x for x in (left, right))
    return left, 0 if causal else right


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """(H, K) of one row."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q, k) * (q.shape[1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores - scores.amax(1, keepdim=True).detach()).exp()
    return torch.einsum("hk,khd->hd", weights / weights.sum(1, keepdim=True), v)


def terms(
    upstream: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: Window = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Absolute terms of the result and the gradients of q and k: zero where a row sees one key."""
    up, packed = upstream["out"], q.dim() == 3
    out, of_q, of_k = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k)
    lengths = q.shape[-3], k.shape[-3]
    rows, keys = (torch.arange(length) for length in lengths)
    both = boundaries_of(cu_seqlens, cu_seqlens_k, *lengths, q.device)
    seen = seen_mask(rows, keys, causal, window, *both)
    for i in [slice(None)] if packed else range(q.shape[0]):
        found = attention_terms(q[i], k[i], v[i], up[i], seen, scale, softcap)
        out[i], of_q[i], of_k[i] = found
    return {"out": out, "q": of_q, "k": of_k}


def yardstick(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: Window = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Careful composition of plain torch ops: SDPA, with a mask of the scores where needed.

    Long sequences go block by block, each over the keys that it can reach; its scores are formed
    again in the backward, since all of them would not fit.
    """
    assert not dropout_p, "what is dropped is random"
    wide = torch.promote_types(q.dtype, torch.float32)
    packed = q.dim() == 3
    dtype = q.dtype
    q, k, v = ((x[None] if packed else x).to(wide).transpose(1, 2) for x in (q, k, v))
    length, key_length, parts = q.shape[2], k.shape[2], []
    boundaries, key_boundaries = boundaries_of(
        cu_seqlens, cu_seqlens_k, length, key_length, q.device
    )
    for first in range(0, max(1, length), BLOCK):
        last = min(length, first + BLOCK)
        low, high = 0, key_length
        if cu_seqlens_k is None and length == key_length:
            low, high = _reach(first, last, length, causal, window, cu_seqlens)
        rows, keys = (torch.arange(*x, device=q.device) for x in ((first, last), (low, high)))
        seen = seen_mask(rows, keys, causal, window, boundaries, key_boundaries)
        operands = (q[:, :, first:last], k[:, :, low:high], v[:, :, low:high], seen, scale, softcap)
        if length <= BLOCK:
            parts.append(_block(*operands))
        else:
            parts.append(checkpoint(_block, *operands, use_reentrant=False))
    out = torch.cat(parts, 2).transpose(1, 2).to(dtype)
    return out[0] if packed else out


def _reach(
    first: int, last: int, length: int, causal: bool, window: Window, cu_seqlens: Tensor | None
) -> tuple[int, int]:
    """No row from first to last sees a key outside these, where keys are rows."""
    left, right = sides(causal, window)
    low = 0 if left is None else max(0, first - left)
    if cu_seqlens is not None:
        starts = cu_seqlens[cu_seqlens <= first]
        low = max(low, int(starts.max())) if starts.numel() else low
    return low, length if right is None else min(length, last + right)


def _block(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    if softcap is not None:
        return _softcapped(q, k, v, seen, scale, softcap)
    alive = seen.any(1)
    out = F.scaled_dot_product_attention(
        q, k, v, seen | ~alive[:, None], scale=scale, enable_gqa=True
    )
    return torch.where(alive[:, None], out, 0)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num() @ v


def boundaries_of(
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    length: int,
    key_length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Boundaries of the documents in rows and in keys, int64; without any, of one document."""
    if cu_seqlens is None:
        ends = (torch.tensor([0, x], device=device) for x in (length, key_length))
        return next(ends), next(ends)
    own = cu_seqlens.long()
    return own, own if cu_seqlens_k is None else cu_seqlens_k.long()


def seen_mask(
    rows: Tensor,
    keys: Tensor,
    causal: bool,
    window: Window,
    boundaries: Tensor,
    key_boundaries: Tensor,
) -> Tensor:
    """(len(rows), len(keys)) bool: True where the row sees the key."""
    left, right = sides(causal, window)
    of_row = torch.searchsorted(boundaries, rows, right=True)  # 0 and S + 1: of no document
    of_key = torch.searchsorted(key_boundaries, keys, right=True)
    ends = of_row.clamp(max=len(boundaries) - 1)
    ahead = (rows + key_boundaries[ends] - boundaries[ends])[:, None] - keys
    seen = (of_row[:, None] == of_key) & (keys < key_boundaries[-1])
    if left is not None:
        seen = seen & (ahead <= left)
    return seen if right is None else seen & (ahead >= -right)


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
