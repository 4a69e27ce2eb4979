"""Segments of rows between offsets, on the torch paths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clamped_bounds(offsets: Tensor, total: int) -> Tensor:
    """Offsets made safe without looking at them: within [0, total] and non-decreasing."""
    return offsets.clamp(0, total).cummax(0).values


def segment_of_row(boundaries: Tensor, total: int) -> Tensor:
    """(T,) in the dtype of boundaries: the segment of each of `total` rows, which they cover."""
    return torch.repeat_interleave(boundaries.diff(), output_size=total)


def find_segment(boundaries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One more than the segment of rows that may lie in none, and whether they lie in one.

    Rows before the first segment have 0, rows behind the last of n have n + 1.
    """
    segment = torch.searchsorted(boundaries, rows, right=True)
    return segment, (segment > 0) & (segment < boundaries.shape[0])


def segment_sum(x: Tensor, boundaries: Tensor) -> Tensor:
    """(n, D) sums of the rows of each segment, which cover (T, D): the fastest that torch has on a
    CPU, without a batching rule or a forward-mode derivative."""
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    return F.embedding_bag(rows, x, boundaries, mode="sum", include_last_offset=True)
