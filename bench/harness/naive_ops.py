"""Naive ops in plain PyTorch, for a whole model at once.

Patches are padded to rectangles, embeddings of all bytes and all logits are in memory, masks are
dense; the other ops are those of `baseline_ops`. Each function computes what the op of its name
does, for the options that the models use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels import Patches

from ..peers.find_patches import by_search, patches_by_document
from .baseline_ops import BASELINE_OPS, Ops


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
    """Return segments of x (T, ...) padded to (n, longest, ...) with zeros, and their mask."""
    boundaries = cu_rows.long()
    lengths = boundaries.diff()
    inside = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    padded = x.new_zeros(*inside.shape, *x.shape[1:])
    padded[inside] = x[: int(boundaries[-1])]
    return padded, inside


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend (B, T, H, K) under a dense (T, T) mask, key heads repeated."""
    positions = torch.arange(q.shape[1], device=q.device)
    back = positions[:, None] - positions
    mask = (back >= 0) & (back < (q.shape[1] if window is None else window))
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


NAIVE_OPS: Ops = {
    **BASELINE_OPS,
    "find_patches": find_patches,
    "byte_pool": byte_pool,
    "segment_pool": segment_pool,
    "attention": attention,
}
"""Arguments of `ops_replaced`."""
