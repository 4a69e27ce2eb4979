"""Layouts in which an `STLM` is shown the ids of a batch: rows as documents, or packed ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_models import BOS_ID
from stlm_models.config import IGNORED

# transformers copies this file into saved folders: imports of stlm are absolute and public.


@dataclass(frozen=True)
class Layout:
    """Columns of a batch (B, T) that hold ids, and documents that these belong to.

    Args:
        shape: (B, T).
        kept: (B, T) bool, where a row has an id; None is everywhere.
        order: (B, T) columns of each row, those with an id first and in their order; None is as
            they are. Each row is one document.
        index, cu_seqlens: in place of order, the flat positions (N,) of all ids and the boundaries
            (S+1,) int32 of their documents.
    """

    shape: tuple[int, int]
    kept: Tensor | None = None
    order: Tensor | None = None
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """x (B, T) as the model is shown it, (B, T) or (N,)."""
        if self.index is not None:
            return x.flatten()[self.index]
        return x if self.order is None else x.gather(1, self.order)

    def take_states(self, x: Tensor) -> Tensor:
        """States (B, T, D) at their columns as `take` gives ids, (B, T, D) or (N, D)."""
        if self.index is not None:
            return x.flatten(0, 1)[self.index]
        return x if self.order is None else x.gather(1, self.order[..., None].expand_as(x))

    def put_back(self, x: Tensor) -> Tensor:
        """Put states of `take_states` at their columns again: (B, T, D)."""
        if self.index is not None:
            rows = x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1])
            return rows.index_copy(0, self.index, x).unflatten(0, self.shape)
        if self.order is None:
            return x
        return x.gather(1, self.order.argsort(1)[..., None].expand_as(x))

    def take_weights(self, weights: Tensor) -> Tensor:
        """Attention weights (B, H, T, T) between columns, between shown positions."""
        return weights if self.order is None else _between(weights, self.order)

    def put_back_weights(self, weights: Tensor) -> Tensor:
        """Put weights of `take_weights` between columns again."""
        return weights if self.order is None else _between(weights, self.order.argsort(1))

    def targets(self, labels: Tensor) -> Tensor:
        """Targets of each shown position, where label t (B, T) stands at its own column."""
        if self.kept is not None:
            labels = labels.masked_fill(~self.kept, IGNORED)
        targets = F.pad(self.take(labels)[..., 1:], (0, 1), value=IGNORED)
        if self.cu_seqlens is None:
            return targets
        last = torch.zeros(len(targets) + 1, dtype=torch.bool, device=targets.device)
        last[self.cu_seqlens[1:].long()] = True
        return targets.masked_fill(last[1:], IGNORED)


def _between(weights: Tensor, places: Tensor) -> Tensor:
    """Weights (B, H, T, T) with rows and columns from these places (B, T) of theirs."""
    rows = places[:, None, :, None].expand_as(weights)
    return weights.gather(2, rows).gather(3, places[:, None, None, :].expand_as(weights))


def layout_of(
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None,  # (B, T)
    position_ids: Tensor | None,  # (B, T) or (1, T)
    cu_seqlens: Tensor | None,  # (S+1,)
    seq_idx: Tensor | None,  # (1, T)
) -> Layout:
    """The layout that these arguments of `STLMForCausalLM.forward` ask for.

    Raises:
        ValueError: for a shape that does not fit, and for positions that neither go on by one nor
            begin a document.
    """
    shape = (input_ids.shape[0], input_ids.shape[1])
    if cu_seqlens is not None or seq_idx is not None:
        if shape[0] != 1 or attention_mask is not None:
            expected = "one row without attention_mask beside cu_seq_lens_q or seq_idx"
            raise ValueError(f"input_ids: expected {expected}, got shape {shape}")
        if cu_seqlens is None:
            assert seq_idx is not None
            cu_seqlens = _boundaries(seq_idx.flatten().diff() != 0)
        index = torch.arange(shape[1], device=input_ids.device)
        return Layout(shape, index=index, cu_seqlens=cu_seqlens.int())
    if attention_mask is None:
        kept = without_leading_padding(input_ids)
    else:
        kept = _checked_mask(attention_mask, shape)
    order = None if kept is None else kept.int().argsort(dim=1, descending=True, stable=True)
    plain = Layout(shape, kept, order)
    return plain if position_ids is None else _packed(plain, position_ids)


def without_leading_padding(input_ids: Tensor) -> Tensor | None:
    """Mask of the ids of rows (B, T) that come without one, bool; None is everywhere.

    Of several ids 256 at the beginning the last begins the document and the others are padding.
    """
    if torch.compiler.is_compiling():  # a graph cannot ask
        return None
    is_start = input_ids == BOS_ID
    if input_ids.shape[1] < 2 or not is_start[:, :2].all(1).any():
        return None
    leading = is_start.long().cumprod(1)
    return ~(leading * F.pad(leading[:, 1:], (0, 1))).bool()


def _checked_mask(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(attention_mask.shape) != shape:
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected shape {shape}, 0 for padding, got {got}")
    return attention_mask.bool()


def _packed(layout: Layout, position_ids: Tensor) -> Layout:
    """The layout, or where positions begin anew one of packed documents."""
    rows, length = layout.shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, rows):
        got = tuple(position_ids.shape)
        raise ValueError(f"position_ids: expected shape {layout.shape}, got {got}")
    if position_ids.shape[1] != length:
        got = tuple(position_ids.shape)
        raise ValueError(f"position_ids: expected shape {layout.shape}, got {got}")
    positions = layout.take(position_ids.expand(rows, length))
    has_id = layout.take(
        torch.ones_like(positions, dtype=torch.bool) if layout.kept is None else layout.kept
    )
    inside = has_id[:, 1:]  # those with an id come first: their predecessor has one too
    steps = positions.diff(dim=1)
    begins = inside & (steps != 1)
    if not begins.any():
        return layout
    if (begins & (positions[:, 1:] != positions[:, :1])).any():
        raise ValueError(
            "position_ids: expected positions that go on by one within a document and begin each"
            " document with the first of its row, got others"
        )
    offsets = torch.arange(rows, device=positions.device)[:, None] * length
    columns = torch.arange(length, device=positions.device).expand(rows, length)
    index = ((columns if layout.order is None else layout.order) + offsets)[has_id]
    first = torch.ones_like(begins[:, :1])
    begins = torch.cat((first, begins), 1)[has_id]
    return Layout(layout.shape, layout.kept, index=index, cu_seqlens=_boundaries(begins[1:]))


def _boundaries(begins: Tensor) -> Tensor:
    """(S+1,) int32 from which of the ids after the first, (N-1,) bool, begin a document."""
    inner = begins.nonzero().flatten() + 1
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(begins) + 1).int()
