"""qkv_rope for judging the others: an fp64 reference, and plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..qk_norm_rope import reference as heads_of


def reference(
    x: Tensor,  # (..., T, D) fp64
    norm_weight: Tensor | None,  # (D,) fp64
    weight: Tensor,  # ((H + 2 H_kv) K, D) fp64
    cos: Tensor,  # (n_positions, K/2) fp64
    sin: Tensor,  # (n_positions, K/2) fp64
    *,
    heads: int,
    kv_heads: int,
    residual: bool = False,
    eps: float = 1e-6,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The product one output column after the other, then the reference of qk_norm_rope."""
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if norm_weight is not None:
        normed = normed * norm_weight
    product = torch.stack([(normed * row).sum(-1) for row in weight], -1)
    by_head = product.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = by_head[..., :heads, :], by_head[..., heads:-kv_heads, :], by_head[..., -kv_heads:, :]
    q, k = heads_of.reference(q, k, cos, sin, eps=eps, **options)
    return (q, k, v, x * 1) if residual else (q, k, v)


def yardstick(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    residual: bool = False,
    eps: float = 1e-6,
    **options: Any,
) -> tuple[Tensor, ...]:
    """F.rms_norm, F.linear and the yardstick of qk_norm_rope: the ops of any library, in turn."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gain = None if norm_weight is None else norm_weight.to(wide)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], gain, eps).to(x.dtype)
    product = F.linear(normed, weight.to(x.dtype)).unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = product.split([heads, kv_heads, kv_heads], -2)
    q, k = heads_of.yardstick(q, k, cos, sin, eps=eps, **options)
    found = q, k, v.contiguous()
    return (*found, x * 1) if residual else found
