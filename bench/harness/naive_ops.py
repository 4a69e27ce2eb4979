"""The library's ops as one writes them at first in stock PyTorch, for a whole model at once.

Patches are padded to rectangles, embeddings of all bytes and all logits are in memory, masks are
dense; elsewhere the compositions of `bench.stock` are what one writes. Each function computes what
the op of its name does, for what the models ask of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels import Patches

from ..peers.find_patches import by_search, patches_by_document
from .baseline_ops import STOCK, Ops


def find_patches(byte_ids: Tensor, *, max_patches: int | None = None, **options: object) -> Patches:
    if max_patches is not None:
        raise ValueError(f"max_patches: expected None in the naive composition, got {max_patches}")
    options = {name: value for name, value in options.items() if value is not None}
    return Patches(*patches_by_document(by_search)(byte_ids, **options))


def byte_pool(byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    return segment_pool(F.embedding(byte_ids.long(), weight), cu_patchlens, mode=mode)


def segment_pool(x: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    padded, inside = _padded(x, cu_patchlens)
    total = padded.sum(1)
    if mode == "sum":
        return total
    if mode != "mean":
        raise ValueError(f'mode: expected "mean" or "sum" in the naive composition, got {mode!r}')
    return total / inside.sum(1).clamp(min=1)[:, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    if cu_seqlens is None:
        return _masked_attention(q, k, v, window)
    (q, inside), (k, _), (v, _) = (_padded(x, cu_seqlens) for x in (q, k, v))
    return _masked_attention(q, k, v, window)[inside]


def _padded(x: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Segments of x (T, ...) as a rectangle (n, longest, ...) with zeros, and where they are."""
    borders = cu_rows.long()
    lengths = borders.diff()
    inside = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    padded = x.new_zeros(*inside.shape, *x.shape[1:])
    padded[inside] = x[: int(borders[-1])]
    return padded, inside


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """(B, T, H, K) under a dense (T, T) mask, key heads repeated."""
    places = torch.arange(q.shape[1], device=q.device)
    back = places[:, None] - places
    mask = (back >= 0) & (back < (q.shape[1] if window is None else window))
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


NAIVE: Ops = {
    **STOCK,
    "find_patches": find_patches,
    "byte_pool": byte_pool,
    "segment_pool": segment_pool,
    "attention": attention,
}
"""For `bench.stock.ops_replaced`."""
