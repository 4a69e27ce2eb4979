"""Segments of rows between offsets, on the torch paths."""

from __future__ import annotations

from torch import Tensor


def clamped_bounds(offsets: Tensor, total: int) -> Tensor:
    """Offsets made safe without looking at them: within [0, total] and non-decreasing."""
    return offsets.clamp(0, total).cummax(0).values
