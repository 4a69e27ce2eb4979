"""segment_pool for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def reference(
    x: Tensor,  # (T, D) fp64
    cu_patchlens: Tensor,  # (P+1,)
    *,
    mode: str = "mean",
) -> Tensor:
    """(P, D) fp64, one patch after the other."""
    boundaries = cu_patchlens.tolist()
    rows = [x[:0]]
    for start, end in pairwise(boundaries):
        patch = x[start:end]
        if start == end:
            row = patch.sum(0)
        elif mode in ("mean", "sum"):
            row = patch.sum(0) / (end - start if mode == "mean" else 1)
        elif mode in ("max", "min"):
            pick = max if mode == "max" else min
            row = torch.stack([column[_first_of(pick, column.tolist())] for column in patch.T])
        else:
            row = patch[-1 if mode == "last" else 0]
        rows.append(row[None])
    return torch.cat(rows)


def _first_of(pick: Callable[[list[float]], float], values: list[float]) -> int:
    """Index of the first NaN, or else of the first value that is picked."""
    for k, value in enumerate(values):
        if value != value:
            return k
    return values.index(pick(values))


def yardstick(x: Tensor, cu_patchlens: Tensor, *, mode: str = "mean") -> Tensor:
    """Careful composition of plain torch ops: float32 inside, the input's dtype outside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = cu_patchlens.diff().long()
    patches = torch.arange(lengths.shape[0], device=x.device).repeat_interleave(lengths)
    zeros = wide.new_zeros(lengths.shape[0], x.shape[1])
    wide = wide[: patches.shape[0]]
    if mode in ("mean", "sum"):
        pooled = zeros.index_add(0, patches, wide)
        if mode == "mean":
            pooled = pooled / lengths.clamp(min=1)[:, None]
    elif mode in ("max", "min"):
        columns = patches[:, None].expand_as(wide)
        pooled = zeros.scatter_reduce(0, columns, wide, f"a{mode}", include_self=False)
    else:
        filled = (lengths > 0).nonzero().flatten()
        rows = (cu_patchlens[1:] - 1 if mode == "last" else cu_patchlens[:-1])[filled].long()
        pooled = zeros.index_copy(0, filled, wide[rows])
    return pooled.to(x.dtype)
