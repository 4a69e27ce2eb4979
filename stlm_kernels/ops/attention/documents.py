"""Packed documents through SDPA: those of equal lengths are a batch, every other one is a call.

On a CPU the calls are to `cpu` and its backward. The gradients of a part
go where its rows lie: autograd's own gradient of a slice is as large as what was cut, which makes
work in proportion to documents times rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import attention_blocks, segments
from ..._torch.attention_blocks import Place
from . import cpu

SHORT = 64
"""Documents up to this length share a batch with others up to the same power of two."""


MASK_ENTRIES = 1 << 22
"""Entries of the largest mask, 16 MB in fp32: longer documents with more keys than rows go
elsewhere."""


class Part(NamedTuple):
    """Documents that SDPA takes as one batch."""

    rows: Place  # (n, L) int64, or one document's range
    keys: Place  # (n, L_k)
    valid: (
        Tensor | None
    )  # (n, L) bool, L_k = L; None: all. What is not valid repeats the first row.


class Plan(NamedTuple):
    """Partition of packed documents."""

    parts: list[Part]
    causal: bool
    scale: float
    mask_entries: int  # of the largest mask
    all_rows: bool  # each row is in a part
    all_keys: bool


class Kept(NamedTuple):
    """Tensors that the backward of a part needs."""

    mask: Tensor | None  # (n or 1, 1, L, L_k)
    lse: Tensor | None  # (n, H, L), of `cpu`, where it gives some
    operands: list[Tensor]  # q (n, H, L, K), k and v (n, H_kv, L_k, K)
    out: Tensor | None  # (n, H, L, K), on other devices, where autograd has recorded it

    def without_operands(self) -> Kept:
        """Return what cannot be taken again."""
        return self._replace(operands=[], out=None)


def plan(
    cu_seqlens: Tensor,  # (S+1,) int32
    cu_seqlens_k: Tensor,  # (S+1,) int32
    rows: int,
    keys: int,
    causal: bool,
    scale: float,
) -> Plan:
    """Read the boundaries."""
    own = segments.clamped_bounds(cu_seqlens, rows).cpu().long()
    same = cu_seqlens_k is cu_seqlens
    other = own if same else segments.clamped_bounds(cu_seqlens_k, keys).cpu().long()
    ends, lengths, key_starts, key_lengths = own[1:], own.diff(), other[:-1], other.diff()
    if causal:  # the first of too many queries stand before the first key
        lengths = lengths.minimum(key_lengths)
    alive = (lengths > 0) & (key_lengths > 0)
    bounds = torch.stack([ends - lengths, lengths, key_starts, key_lengths])[:, alive]
    parts = _parts(bounds, cu_seqlens.device)
    all_rows = int(lengths[alive].sum()) == rows
    all_keys = int(key_lengths[alive].sum()) == keys
    apart = (lengths * key_lengths)[causal & alive & (lengths != key_lengths)]
    largest = int(apart.max()) if len(apart) else 0
    return Plan(parts, causal, scale, largest, all_rows, all_keys)


def _parts(bounds: Tensor, device: torch.device) -> list[Part]:
    """Batches of documents from starts and lengths of rows and keys, (4, S).

    Documents of two lengths by both, long ones by their length, short ones by the power of two
    above it."""
    _, lengths, _, key_lengths = bounds
    folds = (lengths == key_lengths) & (lengths <= SHORT)
    size = torch.where(folds, _power_above(lengths), lengths)
    key_size = torch.where(folds, size, key_lengths)
    kinds, order = (size << 32 | key_size).sort(stable=True)
    kinds, counts = kinds.unique_consecutive(return_counts=True)
    return [
        _part(kind >> 32, kind & 0xFFFFFFFF, group, device)
        for kind, group in zip(
            kinds.tolist(), bounds[:, order].split(counts.tolist(), 1), strict=True
        )
    ]


def _part(size: int, key_size: int, group: Tensor, device: torch.device) -> Part:
    """Batch of documents given by their starts and lengths, (4, n)."""
    if group.shape[1] == 1:
        start, length, key_start, key_length = group[:, 0].tolist()
        return Part(slice(start, start + length), slice(key_start, key_start + key_length), None)
    starts, lengths, key_starts, key_lengths = group.unbind()
    valid = None
    if bool((lengths < size).any()):
        valid = torch.arange(size) < lengths[:, None]
    rows = _rows(starts, size, valid).to(device)
    same = torch.equal(starts, key_starts) and torch.equal(lengths, key_lengths)
    keys = rows if same else _rows(key_starts, key_size, valid).to(device)
    return Part(rows, keys, None if valid is None else valid.to(device))


def _rows(starts: Tensor, size: int, valid: Tensor | None) -> Tensor:
    slots = torch.arange(size)
    return starts[:, None] + (slots if valid is None else torch.where(valid, slots, 0))


def _power_above(lengths: Tensor) -> Tensor:
    return 2 ** lengths.clamp(min=1).double().log2().ceil().long()


def attend(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T_kv, H_kv, K)
    v: Tensor,  # (T_kv, H_kv, K)
    plan: Plan,
    keep: bool,
) -> tuple[Tensor, list[Kept]]:
    """(T, H, K), zeros for rows that see nothing, and, where required, what the backward needs."""
    out, kept = _blank(q, plan.all_rows), []
    for part in plan.parts:
        operands = [_taken(q, part.rows), _taken(k, part.keys), _taken(v, part.keys)]
        done = _forward(operands, _mask(part, plan.causal, q), plan, keep)
        assert done.out is not None
        _put(out, part.rows, part.valid, done.out.detach())
        if keep:
            kept.append(done.without_operands() if _has_flash(q) else done)
    return out, kept


def gradients(
    grad: Tensor,  # (T, H, K)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,  # (T, H, K), where `kept` has log-sum-exps
    plan: Plan,
    kept: list[Kept],
) -> list[Tensor]:
    """Gradients of q, k and v."""
    derived = [_blank(q, plan.all_rows), _blank(k, plan.all_keys), _blank(v, plan.all_keys)]
    for part, forward in zip(plan.parts, kept, strict=True):
        up = _taken(grad, part.rows)
        if part.valid is not None:
            up = up.masked_fill(~part.valid[:, None, :, None], 0)
        places = part.rows, part.keys, part.keys
        operands = [_taken(x, place) for x, place in zip((q, k, v), places, strict=True)]
        own = None if out is None else _taken(out, part.rows)
        found = _backward(up, operands, own, forward, plan)
        for into, place, values in zip(derived, places, found, strict=True):
            _put(into, place, part.valid, values)
    return derived


def _blank(like: Tensor, filled: bool) -> Tensor:
    """Zeros, unless every row is written."""
    make = torch.empty_like if filled else torch.zeros_like
    return make(like, memory_format=torch.contiguous_format)


def _taken(x: Tensor, place: Place) -> Tensor:
    """(n, H, L, K)."""
    return attention_blocks.take(x.detach(), place).transpose(1, 2)


def _put(into: Tensor, place: Place, valid: Tensor | None, values: Tensor) -> None:
    """Write (n, H, L, K) where the rows of a part lie."""
    values = values.transpose(1, 2)
    if isinstance(place, slice):
        into[place] = values[0]
    elif valid is None:
        into.index_copy_(0, place.flatten(), values.flatten(0, 1))
    else:
        into.index_copy_(0, place[valid], values[valid])


def _mask(part: Part, causal: bool, q: Tensor) -> Tensor | None:
    """(n or 1, 1, L, L_k): 0 where a row sees a key, -inf elsewhere."""
    length, keys = attention_blocks.length_of(part.rows), attention_blocks.length_of(part.keys)
    if causal:  # such rows never see what fills up the end
        return None if length == keys else lower_right(length, keys, q)
    if part.valid is None:
        return None
    seen = part.valid[:, None, None].expand(-1, -1, length, -1)
    return torch.where(seen, q.new_zeros(()), -torch.inf)


def lower_right(rows: int, keys: int, like: Tensor) -> Tensor:
    """(1, 1, rows, keys): 0 where a row sees a key, the last row all, -inf elsewhere."""
    mask = like.new_full((rows, keys), -torch.inf)
    return mask.triu_(keys - rows + 1)[None, None]


def _forward(operands: list[Tensor], mask: Tensor | None, plan: Plan, keep: bool) -> Kept:
    causal = plan.causal and mask is None
    if _has_flash(operands[0]):
        q, k, v = operands
        out, lse = cpu.attend(q, k, v, cpu.Call(mask, causal, plan.scale))
        return Kept(mask, lse, operands, out)
    with torch.set_grad_enabled(keep):
        q, k, v = (x.requires_grad_(keep) for x in operands)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=plan.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return Kept(mask, None, operands, out)


def _backward(
    up: Tensor, operands: list[Tensor], out: Tensor | None, forward: Kept, plan: Plan
) -> tuple[Tensor, ...]:
    if not _has_flash(up):
        assert forward.out is not None
        return torch.autograd.grad(forward.out, forward.operands, up, retain_graph=True)
    q, k, v = operands
    mask = forward.mask
    call = cpu.Call(mask, plan.causal and mask is None, plan.scale)
    return cpu.gradients(up, q, k, v, out, forward.lse, call)


def _has_flash(x: Tensor) -> bool:
    return x.is_cpu
