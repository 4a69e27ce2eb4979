"""byte_pool in aten ops: the CPU path, and every case that the kernels do not take.

Forward: EmbeddingBag in sum mode, then the mean's scale (its mean mode is slower on a CPU).
Backward: EmbeddingBag with the roles swapped. Bytes are sorted by id, and the gradient rows of
their patches are summed by runs of one id, which on a CPU takes 0.25 to 0.36 of the time of
EmbeddingBag's own backward at 65,536 bytes and 0.98 at 8,192
(`bench/results/check-cpu-2026-11-27.json`, two threads), and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd
from ..._torch.casting import cast
from ..._torch.function import Function
from ..._torch.segments import clamped_bounds, segment_of_row

CHUNK = 1024
"""Longest run of one id that a thread of a GPU sums before the runs' sums are added up."""


def byte_pool(
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    position_weight: Tensor | None,  # (L, D)
    mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    wide = torch.promote_types(out_dtype, torch.float32)
    table = cast(weight, out_dtype, wide)
    patches, lead = cu_patchlens.shape[0] - 1, 0
    if runtime.values_visible(byte_ids, cu_patchlens):
        last = int(cu_patchlens.numpy()[-1])
        ids = (byte_ids if last == byte_ids.shape[0] else byte_ids[:last]).int()
        boundaries, poison = cu_patchlens, None
    else:
        ids, table, boundaries, poison = _made_safe(byte_ids, table, cu_patchlens)
        patches, lead = patches + 1, 1
    if position_weight is not None:
        ids, table = _gained(ids, table, boundaries, cast(position_weight, out_dtype, wide), poison)
    elif poison is not None:
        table = table + poison
    arguments = (ids, table.contiguous(), boundaries, patches, mean)
    needs_grad = torch.is_grad_enabled() and table.requires_grad
    pool = _Pool.apply if needs_grad or runtime.inside_torch_func() else _pool
    if runtime.carries_tangents(table):
        pool = _plain_pool
    pooled = pool(*arguments)
    pooled = pooled if wide == out_dtype else pooled.to(out_dtype)
    return pooled[lead:] if lead else pooled


def _made_safe(
    byte_ids: Tensor, table: Tensor, cu_patchlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace values that are not checked: ids, table, boundaries, and an addend for the table.

    Bad ids find a zero row that the addend turns to NaN: multiplied by a gain, a NaN row would
    reach the gain's gradient. Bytes of no patch lie in a segment before or after the patches.
    """
    total, vocab = byte_ids.shape[0], table.shape[0]
    ids = byte_ids.long()  # a uint8 would compare with the vocabulary modulo 256
    ids = torch.where((ids >= 0) & (ids < vocab), ids, vocab).int()
    # The last boundary is clamped to `total`: as a fill value it would be compiled in.
    boundaries = F.pad(F.pad(cu_patchlens, (0, 1), value=2**31 - 1), (1, 0))
    poison = F.pad(table.new_zeros(vocab, 1), (0, 0, 0, 1), value=float("nan"))
    return ids, F.pad(table, (0, 0, 0, 1)), clamped_bounds(boundaries, total), poison


def _gained(
    ids: Tensor, table: Tensor, boundaries: Tensor, gain: Tensor, poison: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids and a table whose rows already carry the gain of their slot."""
    slots, vocab = gain.shape[0], table.shape[0]
    position = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int32)
    slot = (position - boundaries[segment_of_row(boundaries, ids.shape[0])]).clamp(max=slots - 1)
    if slots * vocab <= ids.shape[0]:
        rows = gain[:, None] * table[None]
        rows = rows if poison is None else rows + poison
        return slot * vocab + ids, rows.flatten(0, 1)
    # Few bytes beside many slots: their own (T, D) rows are the smaller table.
    rows = F.embedding(ids, table) * F.embedding(slot, gain)
    return position, rows if poison is None else rows + F.embedding(ids, poison)


def _scales(boundaries: Tensor, dtype: torch.dtype) -> Tensor:
    return boundaries.diff().clamp(min=1).to(dtype).reciprocal()


def _bag_sum(
    rows: Tensor, table: Tensor, boundaries: Tensor, weights: Tensor | None = None
) -> Tensor:
    # Beneath F.embedding_bag, whose checks cost as much as a small bag: mode 0 is "sum", and the
    # last argument says that the last boundary is given.
    return torch.embedding_bag(table, rows, boundaries, False, 0, False, weights, True)[0]


def _pool(ids: Tensor, table: Tensor, boundaries: Tensor, patches: int, mean: bool) -> Tensor:
    out = _bag_sum(ids, table, boundaries)
    out = out if out.shape[0] == patches else out[:patches]
    return out.mul_(_scales(boundaries, table.dtype)[:patches, None]) if mean else out


def _plain_pool(ids: Tensor, table: Tensor, boundaries: Tensor, patches: int, mean: bool) -> Tensor:
    """Composition of ops that every torch.func transform knows."""
    out = table.new_zeros(boundaries.shape[0] - 1, table.shape[1])
    out = out.index_add(0, segment_of_row(boundaries, ids.shape[0]), F.embedding(ids, table))
    out = out * _scales(boundaries, table.dtype)[:, None] if mean else out
    return out[:patches]


def _plain_backward(
    grad: Tensor, ids: Tensor, boundaries: Tensor, vocab: int, mean: bool
) -> Tensor:
    """dtable from ops that torch differentiates again."""
    scaled = grad * _scales(boundaries, grad.dtype)[: grad.shape[0], None] if mean else grad
    scaled = F.pad(scaled, (0, 0, 0, boundaries.shape[0] - 1 - grad.shape[0]))
    rows = F.embedding(segment_of_row(boundaries, ids.shape[0]), scaled)
    return grad.new_zeros(vocab, grad.shape[1]).index_add(0, ids, rows)


def _backward(grad: Tensor, ids: Tensor, boundaries: Tensor, vocab: int, mean: bool) -> Tensor:
    """(V, D): for each id the sum of the scaled gradient rows of the patches that hold it."""
    total, device = ids.shape[0], ids.device
    if total == 0 or grad.shape[0] == 0:
        return grad.new_zeros(vocab, grad.shape[1])
    # Radix sorts take time by the width of their keys.
    key_dtype = torch.uint8 if vocab <= 256 else torch.int16 if vocab <= 32_768 else ids.dtype
    key, order = torch.sort(ids.to(key_dtype), stable=True)
    patch = segment_of_row(boundaries, total).index_select(0, order)
    scales = _scales(boundaries, grad.dtype).index_select(0, patch) if mean else None
    missing = boundaries.shape[0] - 1 - grad.shape[0]
    grad = F.pad(grad, (0, 0, 0, missing)) if missing else grad.contiguous()
    every = torch.arange(vocab + 1, device=device, dtype=torch.int32)
    runs = torch.searchsorted(key.int(), every, out_int32=True)
    if not ids.is_cuda:
        return _bag_sum(patch, grad, runs, scales)
    # One thread of a GPU would add up all occurrences of the most frequent byte.
    cuts = torch.arange(0, total, CHUNK, device=device, dtype=torch.int32)
    chunks, _ = torch.sort(torch.cat([runs, cuts]))
    partial = _bag_sum(patch, grad, chunks, scales)
    numbers = torch.arange(partial.shape[0], device=device, dtype=torch.int32)
    return _bag_sum(numbers, partial, torch.searchsorted(chunks, runs, out_int32=True))


class _Pool(Function):
    """Pooling of table rows, with a fast backward that can itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ids: Tensor, table: Tensor, boundaries: Tensor, patches: int, mean: bool) -> Tensor:
        pool = _plain_pool if runtime.inside_torch_func() else _pool
        return autograd.as_output(pool(ids, table, boundaries, patches, mean))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, table, boundaries, _, ctx.mean = inputs
        ctx.save_for_backward(ids, boundaries)
        ctx.vocab = table.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, boundaries = ctx.saved_tensors
        derive = _plain_backward if torch.is_grad_enabled() else _backward
        return None, derive(grads[0], ids, boundaries, ctx.vocab, ctx.mean), None, None, None
