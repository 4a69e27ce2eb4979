"""Rows of a table by their ids, with a gradient that is accumulated in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup(
    table: Tensor,  # (V, D)
    ids: Tensor,  # (...) int32|int64
) -> Tensor:  # (..., D)
    """Return `F.embedding(ids, table)`; its gradient is accumulated in float32 and cast once.

    Of a 16-bit table F.embedding (and indexing) adds up the gradient in 16 bits on a CPU: a bf16
    row that is used more than 256 times stops growing.
    """
    is_narrow = torch.promote_types(table.dtype, torch.float32) != table.dtype
    if is_narrow and table.requires_grad and torch.is_grad_enabled():
        return F.embedding(ids, table.float()).to(table.dtype)
    return F.embedding(ids, table)
