"""unpool for judging the others: an fp64 reference that loops, and plain torch as yardstick."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    patch_states: Tensor,  # (P, D) fp64
    read_ids: Tensor,  # (T,)
    *,
    null_state: Tensor | None = None,  # (D,) fp64
    residual: Tensor | None = None,  # (T, D) fp64
) -> Tensor:
    """(T, D) fp64, one row after the other."""
    null = patch_states.new_zeros(patch_states.shape[1]) if null_state is None else null_state
    rows = [patch_states[:0]]
    for t, patch in enumerate(read_ids.tolist()):
        row = null if patch == -1 else patch_states[patch]
        rows.append((row if residual is None else row + residual[t])[None])
    return torch.cat(rows)


def yardstick(
    patch_states: Tensor,
    read_ids: Tensor,
    *,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: float32 inside, the states' dtype outside."""
    wide = torch.promote_types(patch_states.dtype, torch.float32)
    table = F.pad(patch_states.to(wide), (0, 0, 1, 0))
    if null_state is not None:
        table = torch.cat([null_state.to(wide)[None], table[1:]])
    rows = table.index_select(0, read_ids.long() + 1)
    if residual is not None:
        rows = rows + residual.to(wide)
    return rows.to(patch_states.dtype)
