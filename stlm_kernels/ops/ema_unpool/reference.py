"""ema_unpool for judging the others: an fp64 reference that loops, and plain torch as yardstick."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    patch_states: Tensor,  # (P, D) fp64
    gate: Tensor,  # (P,) fp64
    read_ids: Tensor,  # (T,)
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,), counts patches
    residual: Tensor | None = None,  # (T, D) fp64
) -> Tensor:
    """(T, D) fp64, one patch after the other, then one row after the other."""
    nothing = patch_states.new_zeros(patch_states.shape[1])
    boundaries = [0, len(gate)] if cu_seqlens is None else cu_seqlens.tolist()
    smoothed = [nothing] * len(gate)
    for first, end in pairwise(boundaries):
        z = nothing
        for j in range(first, end):
            before = z.nan_to_num() if gate[j] == 1 else z  # which forgets even NaN
            z = smoothed[j] = gate[j] * patch_states[j] + (1 - gate[j]) * before
    rows = [patch_states[:0]]
    for t, patch in enumerate(read_ids.tolist()):
        row = nothing if patch == -1 else smoothed[patch]
        rows.append((row if residual is None else row + residual[t])[None])
    return torch.cat(rows)


def yardstick(
    patch_states: Tensor,
    gate: Tensor,
    read_ids: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: float32 inside, the states' dtype outside."""
    wide = torch.promote_types(patch_states.dtype, torch.float32)
    patches = patch_states.shape[0]
    starts, end = ({0}, patches) if cu_seqlens is None else _documents(cu_seqlens)
    z = nothing = patch_states.new_zeros(patch_states.shape[1], dtype=wide)
    smoothed = [nothing]
    states, gates = patch_states.to(wide).unbind(), gate.to(wide).unbind()
    for j in range(end):
        z = torch.lerp(nothing if j in starts else z, states[j], gates[j])
        smoothed.append(z)
    table = F.pad(torch.stack(smoothed), (0, 0, 0, patches - end))
    rows = table.index_select(0, read_ids.long() + 1)
    if residual is not None:
        rows = rows + residual.to(wide)
    return rows.to(patch_states.dtype)


def _documents(cu_seqlens: Tensor) -> tuple[set[int], int]:
    boundaries = cu_seqlens.tolist()
    return set(boundaries[:-1]), boundaries[-1]
