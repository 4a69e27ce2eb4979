"""byte_pool for judging the others: an fp64 reference that loops, and plain torch as yardstick."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D) fp64
    cu_patchlens: Tensor,  # (P+1,)
    *,
    mode: str = "mean",
    position_weight: Tensor | None = None,  # (L, D) fp64
) -> Tensor:
    """(P, D) fp64, one patch after the other."""
    boundaries = cu_patchlens.tolist()
    rows = [weight.new_zeros(0, weight.shape[1])]
    for start, end in pairwise(boundaries):
        row = weight.new_zeros(weight.shape[1])
        for k, byte in enumerate(byte_ids[start:end].tolist()):
            gain = (
                1.0
                if position_weight is None
                else position_weight[min(k, position_weight.shape[0] - 1)]
            )
            row = row + weight[byte] * gain
        if mode == "mean" and end > start:
            row = row / (end - start)
        rows.append(row[None])
    return torch.cat(rows)


def yardstick(
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    *,
    mode: str = "mean",
    position_weight: Tensor | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: float32 inside, the table's dtype outside."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    lengths = cu_patchlens.diff().long()
    patches = torch.arange(lengths.shape[0], device=weight.device).repeat_interleave(lengths)
    ids = byte_ids[: patches.shape[0]].long()
    embedded = F.embedding(ids, weight.to(wide))
    if position_weight is not None:
        slot = torch.arange(ids.shape[0], device=ids.device) - cu_patchlens[patches]
        slot = slot.clamp(max=position_weight.shape[0] - 1)
        embedded = embedded * position_weight.to(weight.dtype).to(wide)[slot]
    pooled = embedded.new_zeros(lengths.shape[0], weight.shape[1]).index_add(0, patches, embedded)
    if mode == "mean":
        pooled = pooled / lengths.clamp(min=1)[:, None]
    return pooled.to(weight.dtype)
