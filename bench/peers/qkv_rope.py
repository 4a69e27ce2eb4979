"""Peers of qkv_rope."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stlm_kernels import qk_norm_rope
from stlm_kernels.spec import Inputs

from .entry import Entry, compiled
from .qk_norm_rope import norm_rotate, tables_by_row


def _with_tables(inputs: Inputs) -> Inputs:
    """Give cos and sin of every position as `qk_norm_rope`'s peers take them; untimed."""
    kept = {name: x for name, x in inputs.items() if name != "positions"}
    return kept | tables_by_row(inputs, inputs["x"].shape[:-1], inputs["x"].dtype)


def _heads(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, heads: int, kv_heads: int, eps: float
) -> list[Tensor]:
    """q, k and v before their norms: one norm, one product."""
    gain = None if norm_weight is None else norm_weight.to(x.dtype)
    product = F.linear(F.rms_norm(x, x.shape[-1:], gain, eps), weight)
    by_head = product.unflatten(-1, (heads + 2 * kv_heads, -1))
    return list(by_head.split([heads, kv_heads, kv_heads], -2))


def _one_by_one(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    **weights: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(x, norm_weight, weight, heads, kv_heads, eps)
    return *norm_rotate(q, k, cos, sin, eps, **weights), v.contiguous()


def _with_qk_norm_rope(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(x, norm_weight, weight, heads, kv_heads, eps)
    return *qk_norm_rope(q, k, cos, sin, eps=eps, **options), v


_ONE_BY_ONE = Entry("F.rms_norm + F.linear + rotation", _one_by_one, _with_tables)

PEERS: dict[str, tuple[Entry, ...]] = {
    "qkv_rope": (
        _ONE_BY_ONE,
        Entry("F.rms_norm + F.linear + qk_norm_rope", _with_qk_norm_rope),
        compiled(_ONE_BY_ONE),
    ),
}
