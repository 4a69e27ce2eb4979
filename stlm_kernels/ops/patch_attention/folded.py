"""patch_attention on a CPU: the patches of one length are a batch of torch's own flash attention.

Nothing is padded, so nothing is masked, and a NaN stays in its patch by itself (with `causal`
masked rows must be finite). Where patches of one length lie behind each other, nothing is copied.
T rows hold fewer than sqrt(2 T) distinct lengths, which bounds the number of calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fold(NamedTuple):
    """All patches of one length."""

    rows: Tensor | slice  # (n L,) int64, or a range if the patches lie behind each other
    length: int


def folds_of(cu_patchlens: Tensor) -> list[Fold]:
    boundaries = cu_patchlens.long()
    lengths, order = boundaries.diff().sort(stable=True)
    sizes, counts = lengths.unique_consecutive(return_counts=True)
    groups = boundaries[:-1].gather(0, order).split(counts.tolist())
    return [
        _fold(starts, length)
        for starts, length in zip(groups, sizes.tolist(), strict=True)
        if length > 0
    ]


def _fold(starts: Tensor, length: int) -> Fold:
    first, last = int(starts[0]), int(starts[-1])
    if last - first == (starts.shape[0] - 1) * length:
        return Fold(slice(first, last + length), length)
    return Fold((starts[:, None] + torch.arange(length)).flatten(), length)


def attend(
    q: Tensor,  # (T, H, K) fp32 or fp64
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    folds: list[Fold],
    causal: bool,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """(T, H, K), and the log-sum-exps of each call."""
    parts, sums = [], []
    operands = [_with_rows(x) for x in (q, k, v)]
    for fold in folds:
        batches = (_batch(x, fold) for x in operands)
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *batches, 0.0, causal, scale=scale
        )
        parts.append(part)
        sums.append(lse)
    return _flat(parts, folds, q), sums


def gradients(
    grad: Tensor,  # (T, H, K)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # (T, H, K)
    sums: list[Tensor],
    folds: list[Fold],
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v."""
    parts = []
    operands = [_with_rows(x) for x in (grad, q, k, v, out)]
    for fold, lse in zip(folds, sums, strict=True):
        batches = (_batch(x, fold) for x in operands)
        parts.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *batches, lse, 0.0, causal, scale=scale
            )
        )
    return tuple(_flat([part[i] for part in parts], folds, x) for i, x in enumerate((q, k, v)))


def _with_rows(x: Tensor) -> Tensor:
    """A head of all rows is a matrix of the BLAS; expanded and transposed ones are not."""
    return x if x.stride(2) == 1 and x.stride(0) >= x.shape[2] else x.contiguous()


def _batch(x: Tensor, fold: Fold) -> Tensor:
    """(n, H, L, K)."""
    rows = x[fold.rows] if isinstance(fold.rows, slice) else x.index_select(0, fold.rows)
    return rows.unflatten(0, (-1, fold.length)).transpose(1, 2)


def _flat(parts: list[Tensor], folds: list[Fold], like: Tensor) -> Tensor:
    """The way back, (T, H, K); zeros for rows of no patch."""
    if len(folds) == 1 and folds[0].rows == slice(0, len(like)):
        return _rows(parts[0])  # most of a copy is the kernel handing out fresh pages
    flat = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for part, (rows, _) in zip(parts, folds, strict=True):
        if isinstance(rows, slice):
            flat[rows] = _rows(part)
        else:
            flat.index_copy_(0, rows, _rows(part))
    return flat


def _rows(part: Tensor) -> Tensor:
    return part.transpose(1, 2).flatten(0, 1)
