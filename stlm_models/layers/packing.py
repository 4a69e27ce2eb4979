"""Packed documents: their boundaries, where each begins, and the rows that belong to none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import IGNORED


def document_borders(byte_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens of the flattened byte_ids."""
    if byte_ids.dim() == 2:
        return dense_cu_seqlens(byte_ids, cu_seqlens)
    if cu_seqlens is None:
        return dense_cu_seqlens(byte_ids[None])
    require_type(cu_seqlens, Tensor, "cu_seqlens", "a tensor")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected int32 (S+1,), got {got}")
    return cu_seqlens


def dense_cu_seqlens(byte_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Document borders of dense (B, T) ids, whose rows are the documents."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with dense byte_ids, got a tensor")
    rows, length = byte_ids.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=byte_ids.device) * length


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """For each of `length` rows the first row of its document, (length,) int64."""
    rows = torch.arange(length, device=cu_seqlens.device)
    # right=True steps over empty documents: a row belongs to the last that starts at or before.
    return cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1]


def clear_unused(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x (N, D) with zeros in the rows of no document, whatever they hold, NaN even.

    Nothing reads them, but in the gradient of a linear map zero times NaN is not zero.
    """
    unused = torch.arange(len(x), device=x.device) >= cu_seqlens[-1]
    return x.masked_fill(unused[:, None], 0)


def targets_of_documents(
    targets: Tensor,  # (T,) or (B, T) integers
    cu_seqlens: Tensor | None,  # (S+1,) int32, of packed targets
) -> Tensor:
    """The targets, -100 from cu_seqlens[-1] on: rows there belong to no document.

    Other integers than int64 are widened first, where -100 may be no value of theirs.
    """
    if cu_seqlens is None:
        return targets
    outside = torch.arange(len(targets), device=targets.device) >= cu_seqlens[-1]
    return targets.long().masked_fill(outside, IGNORED)


def require_type(value: object, kind: type, name: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
