"""Peers of decode_attention: one query for each sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled


def _with_mask(inputs: Inputs) -> Inputs:
    """Replace the lengths by a (B, 1, 1, C) bool mask, made outside the timing."""
    k_cache, lens = inputs["k_cache"], inputs["cache_lens"].long()[:, None]
    positions = torch.arange(k_cache.shape[1], device=k_cache.device)
    window = k_cache.shape[1] if inputs["window"] is None else inputs["window"]
    mask = (positions < lens) & (positions >= lens - window)
    names = ("q", "k_cache", "v_cache", "scale")
    return {name: inputs[name] for name in names} | {"mask": mask[:, None, None]}


def _without_cap(case: Case) -> str | None:
    return "it has no softcap" if "cap" in case.sizes else None


def _never_empty(case: Case) -> str | None:
    """Refuse empty caches: a softmax over nothing is NaN."""
    return _without_cap(case) or ("a cache is empty" if case["lens"] == "ragged" else None)


def _sdpa_gqa(q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: Any, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out[:, :, 0]


def _sdpa_grouped(q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: Any, mask: Tensor) -> Tensor:
    """Attend with the queries of a key head as one sequence, so that no head is repeated."""
    kv_heads = k_cache.shape[2]
    out = F.scaled_dot_product_attention(
        q.unflatten(1, (kv_heads, -1)),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return out.flatten(1, 2)


def _matmul(q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: Any, mask: Tensor) -> Tensor:
    queries = q.unflatten(1, (k_cache.shape[2], -1))
    scores = (
        queries @ k_cache.permute(0, 2, 3, 1) * (q.shape[2] ** -0.5 if scale is None else scale)
    )
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ v_cache.transpose(1, 2)).flatten(1, 2)


_MATMUL = Entry("matmul, softmax, matmul", _matmul, _with_mask, _never_empty)

PEERS: dict[str, tuple[Entry, ...]] = {
    "decode_attention": (
        Entry("SDPA with a mask", _sdpa_grouped, _with_mask, _without_cap),
        Entry("SDPA with a mask, enable_gqa", _sdpa_gqa, _with_mask, _without_cap),
        _MATMUL,
        compiled(_MATMUL),
    ),
}
