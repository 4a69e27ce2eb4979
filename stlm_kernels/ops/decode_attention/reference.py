"""decode_attention for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,  # (B, H, K) fp64
    k_cache: Tensor,  # (B, C, H_kv, K) fp64
    v_cache: Tensor,  # (B, C, H_kv, K) fp64
    cache_lens: Tensor,  # (B,)
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(B, H, K) fp64, head by head, over nothing but the entries that are seen."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    for b, end in enumerate(cache_lens.tolist()):
        start = 0 if window is None else max(0, end - window)
        for h in range(q.shape[1] if end else 0):
            k, v = (x[b, start:end, h // group] for x in (k_cache, v_cache))
            z = (k @ q[b, h]) * (q.shape[2] ** -0.5 if scale is None else scale)
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            out[b, h] = z.softmax(0) @ v
    return out


def yardstick(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Careful composition of plain torch ops, sequence by sequence: float32 inside."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape, dtype=wide)
    group = q.shape[1] // k_cache.shape[2]
    for b, end in enumerate(cache_lens.tolist()):
        start = 0 if window is None else max(0, end - window)
        if end == 0:
            continue
        k, v = (x[b, start:end].to(wide).transpose(0, 1) for x in (k_cache, v_cache))
        rows = q[b].to(wide)[:, None]  # (H, 1, K)
        if softcap is None:
            whole = F.scaled_dot_product_attention(
                rows[None], k[None], v[None], scale=scale, enable_gqa=True
            )
            out[b] = whole[0, :, 0]
            continue
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        z = rows @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        out[b] = ((softcap * torch.tanh(z / softcap)).softmax(-1) @ v)[:, 0]
    return out.to(q.dtype)
