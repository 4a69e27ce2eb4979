"""Means of row losses: what they are divided by, and over no row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from .options import RowOptions


def counted(target: Tensor, class_weight: Tensor | None, options: RowOptions) -> Tensor:
    """Divisor of a mean: the rows that count, or the sum of their targets' weights."""
    wide = target.long().flatten()
    kept = wide != options.ignore_index
    if class_weight is None:
        return kept.sum()
    index = torch.where(kept, wide, 0).clamp(0, options.valid_vocab - 1)
    dtype = torch.promote_types(class_weight.dtype, torch.float32)
    return torch.where(kept, class_weight.to(dtype)[index], 0).sum()


def mean_of_counted(total: Tensor, count: Tensor) -> Tensor:
    """The mean of a sum of row losses; over no row NaN, with gradients of exactly 0."""
    if runtime.values_visible(total, count) and count != 0:
        return total / count
    some = count != 0
    return torch.where(some, total / torch.where(some, count, 1), float("nan"))
