"""decode_attention in aten ops.

Where the lengths may be read, sequences that lie side by side and see the same range go through
SDPA together, over views of the caches that end where the range ends. Where they may not (a GPU,
compile, torch.func), every entry takes part under a mask, and what is masked is zeroed first, so
that a NaN in it does no harm.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime


def decode_attention(
    q: Tensor,  # (B, H, K)
    k_cache: Tensor,  # (B, C, H_kv, K)
    v_cache: Tensor,  # (B, C, H_kv, K)
    cache_lens: Tensor,  # (B,) int32
    window: int,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B, H, K) in `out_dtype`; softcap 0 stands for none."""
    attend = _by_length if runtime.values_visible(cache_lens) else _masked
    with runtime.without_autocast(q):
        q, k_cache, v_cache = (x.to(out_dtype) for x in (q, k_cache, v_cache))
        return attend(q, k_cache, v_cache, cache_lens, window, scale, softcap)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, K) as (B, H_kv, G, K): queries of one key head are rows of one product."""
    return q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))


def _by_length(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    parts, first = [], 0
    for end, run in groupby(cache_lens.tolist()):
        rows = slice(first, first + len(list(run)))
        first = rows.stop
        seen = slice(max(0, end - window), end)
        k, v = (x[rows, seen].transpose(1, 2) for x in (k_cache, v_cache))
        queries = _grouped(q[rows], k.shape[1])
        if end == 0:
            parts.append(torch.zeros_like(queries))
        elif softcap:
            parts.append(_products(queries, k, v, None, scale, softcap))
        else:
            parts.append(F.scaled_dot_product_attention(queries, k, v, scale=scale))
    if not parts:
        return torch.empty_like(q)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)


def _masked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    places = torch.arange(k_cache.shape[1], device=q.device)
    ends = cache_lens.clamp(0, k_cache.shape[1])[:, None]
    seen = (places < ends) & (places >= ends - window)  # (B, C)
    k, v = (torch.where(seen[:, :, None, None], x, 0).transpose(1, 2) for x in (k_cache, v_cache))
    out = _products(_grouped(q, k.shape[1]), k, v, seen[:, None, None], scale, softcap)
    return out.flatten(1, 2)


def _products(
    q: Tensor,  # (B, H_kv, G, K)
    k: Tensor,  # (B, H_kv, L, K)
    v: Tensor,  # (B, H_kv, L, K)
    seen: Tensor | None,  # (B, 1, 1, L)
    scale: float,
    softcap: float,
) -> Tensor:
    """(B, H_kv, G, K), with everything between in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    z = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    weights = (z if seen is None else z.masked_fill(~seen, -torch.inf)).softmax(-1)
    if seen is not None:  # a query that sees nothing gets nothing; NaN stays with those that see it
        weights = torch.where(seen, weights, 0)
    return (weights @ v.to(wide)).to(q.dtype)
