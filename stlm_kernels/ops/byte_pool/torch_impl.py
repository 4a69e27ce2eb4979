"""byte_pool in aten ops: the CPU path, and every case that the kernels do not take.

Forward: EmbeddingBag in sum mode, then the mean's scale (its own mean mode takes twice the time).
Backward: EmbeddingBag with the roles swapped. Bytes are sorted by id, and the gradient rows of
their patches are summed by runs of one id, which is four to six times as fast on a CPU as
EmbeddingBag's own backward, and deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks

PIECE = 1024
"""Longest run of one id that is summed by one thread before the runs' sums are added up."""


def byte_pool(
    byte_ids: Tensor,  # (T,)
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    slot_gain: Tensor | None,  # (L, D)
    mean: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, D) in `out_dtype`."""
    total, vocab = byte_ids.shape[0], weight.shape[0]
    wide = torch.promote_types(out_dtype, torch.float32)
    table = weight.to(out_dtype).to(wide)
    ids, borders = byte_ids, cu_patchlens
    if not _checks.values_visible(byte_ids, cu_patchlens):
        ids = torch.where((ids >= 0) & (ids < vocab), ids.int(), vocab)
        table = torch.cat([table, table.new_full((1, table.shape[1]), float("nan"))])
        borders = _checks.clamped_bounds(cu_patchlens, total)
    # One more border: EmbeddingBag adds what lies beyond the last one to the last bag.
    borders = F.pad(borders, (0, 1), value=total)
    if slot_gain is not None:
        ids, table = _gained(ids.int(), table, borders, slot_gain.to(out_dtype).to(wide))
    pooled = _BagSum.apply(ids.int(), table.contiguous(), borders)[:-1]
    if mean:
        lengths = borders.diff()[:-1].clamp(min=1)
        pooled = pooled * lengths.to(wide).reciprocal()[:, None]
    return pooled.to(out_dtype)


def _gained(
    ids: Tensor, table: Tensor, borders: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids and a table whose rows already carry the gain of their slot."""
    slots, vocab = gain.shape[0], table.shape[0]
    patch = _patch_of(borders, ids.shape[0])
    position = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int32)
    slot = (position - borders[patch]).clamp(max=slots - 1)
    if slots * vocab <= ids.shape[0]:
        return slot * vocab + ids, (gain[:, None] * table[None]).flatten(0, 1)
    # Few bytes beside many slots: their own (T, D) rows are the smaller table.
    return position, F.embedding(ids, table) * F.embedding(slot, gain)


def _patch_of(borders: Tensor, total: int) -> Tensor:
    """(T,) int32: which segment each position lies in."""
    segments = torch.arange(borders.shape[0] - 1, device=borders.device, dtype=torch.int32)
    return torch.repeat_interleave(segments, borders.diff(), output_size=total)


def _bag_sum(ids: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    return F.embedding_bag(ids, table, borders, mode="sum", include_last_offset=True)


def _plain_bag_sum(ids: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    """The same from ops that torch differentiates any number of times."""
    out = table.new_zeros(borders.shape[0] - 1, table.shape[1])
    return out.index_add(0, _patch_of(borders, ids.shape[0]), F.embedding(ids, table))


def _rows_by_id(grad: Tensor, ids: Tensor, borders: Tensor, vocab: int) -> Tensor:
    """(V, D): for each id the sum of the gradient rows of the patches that hold it."""
    total = ids.shape[0]
    if total == 0:
        return grad.new_zeros(vocab, grad.shape[1])
    key = ids.to(torch.uint8) if vocab <= 256 else ids
    key, order = torch.sort(key, stable=True)
    every = torch.arange(vocab + 1, device=ids.device, dtype=torch.int32)
    runs = torch.searchsorted(key.int(), every, out_int32=True)
    cuts = torch.arange(0, total, PIECE, device=ids.device, dtype=torch.int32)
    pieces, _ = torch.sort(torch.cat([runs, cuts]))
    partial = _bag_sum(_patch_of(borders, total)[order], grad.contiguous(), pieces)
    run_pieces = torch.searchsorted(pieces, runs, out_int32=True)
    numbers = torch.arange(partial.shape[0], device=ids.device, dtype=torch.int32)
    return _bag_sum(numbers, partial, run_pieces)


class _BagSum(torch.autograd.Function):
    """Sum of table rows by bag, with a fast backward that can itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ids: Tensor, table: Tensor, borders: Tensor) -> Tensor:
        if _checks.inside_torch_func(table):
            return _plain_bag_sum(ids, table, borders)
        return _bag_sum(ids, table, borders)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, table, borders = inputs
        ctx.save_for_backward(ids, borders)
        ctx.vocab = table.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, borders = ctx.saved_tensors
        grad = grads[0]
        if torch.is_grad_enabled():
            rows = F.embedding(_patch_of(borders, ids.shape[0]), grad)
            zeros = grad.new_zeros(ctx.vocab, grad.shape[1])
            return None, zeros.index_add(0, ids, rows), None
        return None, _rows_by_id(grad, ids, borders, ctx.vocab), None
