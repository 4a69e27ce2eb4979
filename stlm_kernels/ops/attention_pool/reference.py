"""attention_pool for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import attention_terms


def reference(
    query: Tensor,  # (H, K) or (P, H, K) fp64
    key: Tensor,  # (T, H_kv, K) fp64
    value: Tensor,  # (T, H_kv, K) fp64
    cu_patchlens: Tensor,  # (P+1,)
    *,
    scale: float | None = None,
) -> Tensor:
    """(P, H, K) fp64, one patch after the other."""
    heads, width = query.shape[-2:]
    group = heads // key.shape[1]
    rows = [query.new_zeros(0, heads, width)]
    for patch, (start, end) in enumerate(pairwise(cu_patchlens.tolist())):
        own = query if query.ndim == 2 else query[patch]
        k, v = (x[start:end].repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("hd,thd->ht", own, k) * (width**-0.5 if scale is None else scale)
        weights = scores.softmax(1) if end > start else scores
        rows.append(torch.einsum("ht,thd->hd", weights, v)[None])
    return torch.cat(rows)


def terms(
    upstream: dict[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_patchlens: Tensor,
    *,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """Absolute terms of the result and of both gradients: zero in a patch of one byte."""
    of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
    out = torch.zeros_like(upstream["out"])
    for patch, (start, end) in enumerate(pairwise(cu_patchlens.tolist())):
        own = slice(start, end)
        rows = query[None] if query.ndim == 2 else query[patch : patch + 1]
        seen = torch.ones(1, end - start, dtype=torch.bool)
        up = upstream["out"][patch : patch + 1]
        found = attention_terms(rows, key[own], value[own], up, seen, scale)
        out[patch], of_row, of_key[own] = found[0][0], found[1], found[2]
        (of_query if query.ndim == 2 else of_query[patch]).add_(of_row[0])
    return {"out": out, "query": of_query, "key": of_key}


def yardstick(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_patchlens: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: SDPA over patches of one length at a time."""
    wide = torch.promote_types(key.dtype, torch.float32)
    starts, lengths = cu_patchlens[:-1].long(), cu_patchlens.diff().long()
    cast = query.to(key.dtype).to(wide)
    queries = cast.expand(lengths.shape[0], *query.shape[-2:])
    out = torch.zeros_like(queries)
    for length in lengths[lengths > 0].unique().tolist():
        here = (lengths == length).nonzero().flatten()
        rows = starts[here][:, None] + torch.arange(length, device=key.device)
        k, v = (x.to(wide)[rows].transpose(1, 2) for x in (key, value))
        part = F.scaled_dot_product_attention(
            queries[here][:, :, None], k, v, scale=scale, enable_gqa=True
        )
        out = out.index_copy(0, here, part[:, :, 0])
    return out.to(key.dtype)
