"""patch_attention in aten ops, in pieces whose scores stay small.

Where the borders may be read, patches of similar length (up to a power of two) fold into a batch,
and a patch too long for that is cut into blocks of queries: work stays near the sum of the squared
lengths, memory near the operands. Where they may not (compile, torch.func), a block of queries
meets every row under a mask: static shapes, work T squared.

The backward forms each piece's weights again, so that nothing of size n squared is kept; where it
is itself recorded, it goes through the plain composition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _checks
from ..._rounding import rounded

PIECE_SCORES = 1 << 20
"""Scores formed at a time: 4 MB in fp32 stay in a core's cache between the passes over them."""
LEAST_ROWS = 16
"""Queries below which the products of a very long patch lose their efficiency."""

Place = Tensor | slice


class Piece(NamedTuple):
    """Some queries and all the keys that they can see; -> n patches side by side."""

    rows: Place  # (n, L_q) positions, or a range (n = 1)
    keys: Place  # (n, L_k)
    hidden: Tensor | None  # (n or 1, L_q or 1, L_k) bool, True: not seen; None: all are seen
    mixed: bool  # what is hidden may hold NaN, so masking the weights is not enough


def patch_attention(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, H, K) in `out_dtype`."""
    wide = torch.promote_types(out_dtype, torch.float32)
    q, k, v = (rounded(x, out_dtype, wide) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if _checks.inside_torch_func():
            pieces = _static_pieces(cu_patchlens, q.shape[0], q.shape[1], causal)
            out = _attend_all(q, k, v, pieces, scale)
        else:
            out = _Attention.apply(q, k, v, cu_patchlens, causal, scale)
    return out.to(out_dtype, copy=True)  # `out` is a view, which nobody could change in place


# Cutting the work into pieces


def _pieces_of(
    cu_patchlens: Tensor, tensors: tuple[Tensor, ...], heads: int, causal: bool
) -> Iterator[Piece]:
    total = tensors[0].shape[0]
    if torch.compiler.is_compiling():
        return _static_pieces(cu_patchlens, total, heads, causal)
    # Only rows that other rows must not see can do harm, and only with NaN or infinity in them.
    mixed = not all(bool(x.sum().isfinite()) for x in tensors)
    return _ragged_pieces(cu_patchlens, total, heads, causal, mixed)


def _ragged_pieces(
    cu_patchlens: Tensor, total: int, heads: int, causal: bool, mixed: bool
) -> Iterator[Piece]:
    """Patches by the power of two above their length; row `total` fills the places left over."""
    borders = cu_patchlens.clamp(0, total).cpu().long().cummax(0).values
    starts, lengths = borders[:-1], borders.diff()
    block = 1
    longest = int(lengths.max()) if lengths.numel() else 0
    while block < 2 * longest and heads * block * block <= PIECE_SCORES:
        here = (lengths > block // 2) & (lengths <= block)
        if bool(here.any()):
            step = PIECE_SCORES // (heads * block * block)
            parts = zip(starts[here].split(step), lengths[here].split(step), strict=True)
            for start, length in parts:
                piece = _folded(start, length, block, total, causal, mixed)
                yield _moved(piece, cu_patchlens.device)
        block *= 2
    for patch in (lengths > block // 2).nonzero().flatten().tolist():
        start, end = int(borders[patch]), int(borders[patch + 1])
        yield from _long_pieces(start, end, heads, causal, mixed, cu_patchlens.device)


def _folded(
    starts: Tensor, lengths: Tensor, block: int, total: int, causal: bool, mixed: bool
) -> Piece:
    slots = torch.arange(block)
    beyond = slots >= lengths[:, None]
    rows = torch.where(beyond, total, starts[:, None] + slots)
    hidden = beyond[:, None] if bool(beyond.any()) else None
    if causal:
        later = (slots[None, :] > slots[:, None])[None]
        hidden = later if hidden is None else hidden | later
    return Piece(rows, rows, hidden, mixed)


def _moved(piece: Piece, device: torch.device) -> Piece:
    if device.type == "cpu":
        return piece
    rows = piece.rows.to(device) if isinstance(piece.rows, Tensor) else piece.rows
    hidden = None if piece.hidden is None else piece.hidden.to(device)
    return Piece(rows, rows, hidden, piece.mixed)


def _long_pieces(
    start: int, end: int, heads: int, causal: bool, mixed: bool, device: torch.device
) -> Iterator[Piece]:
    step = max(LEAST_ROWS, PIECE_SCORES // (heads * (end - start)))
    for first in range(start, end, step):
        last = min(end, first + step)
        hidden, limit = None, end
        if causal:
            limit = last
            rows = torch.arange(first, last, device=device)
            hidden = (torch.arange(start, limit, device=device) > rows[:, None])[None]
        yield Piece(slice(first, last), slice(start, limit), hidden, mixed)


def _static_pieces(cu_patchlens: Tensor, total: int, heads: int, causal: bool) -> Iterator[Piece]:
    borders = _checks.clamped_bounds(cu_patchlens, total).long()
    rows = torch.arange(total, device=cu_patchlens.device)
    patch = torch.searchsorted(borders, rows, right=True)  # 0 and P + 1 are no patches
    alive = (patch > 0) & (patch < borders.shape[0])
    step = max(LEAST_ROWS, PIECE_SCORES // max(1, heads * total))
    for first in range(0, total, step):
        part = slice(first, min(total, first + step))
        hidden = (patch[part, None] != patch) | ~alive
        if causal:
            hidden = hidden | (rows > rows[part, None])
        yield Piece(part, slice(0, total), hidden[None], True)


# One piece


def _take(x: Tensor, place: Place) -> Tensor:
    """(n, L, H, K) of (T, H, K)."""
    if isinstance(place, slice):
        return x[place][None]
    return x.index_select(0, place.flatten()).view(*place.shape, *x.shape[1:])


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(n, L, H, K) as (n, H_kv, G L, K): the queries of one key head below each other."""
    n, length, heads, width = x.shape
    x = x.reshape(n, length, kv_heads, heads // kv_heads, width)
    return x.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, -1, width)


def _ungrouped(x: Tensor, length: int) -> Tensor:
    """The way back, (n L, H, K)."""
    n, kv_heads, rows, width = x.shape
    x = x.reshape(n, kv_heads, rows // max(1, length), length, width)
    return x.permute(0, 3, 1, 2, 4).reshape(n * length, -1, width)


def _harmless(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with a NaN or an infinity zeroed; NaN for each of them, 0 for the others (..., 1)."""
    poison = (x.detach() * 0).sum(-1, keepdim=True)
    return torch.where(poison == 0, x, 0), poison


class Formed(NamedTuple):
    """The operands of a piece, (n, H_kv, rows, K), and its weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor  # (n, H_kv, G L_q, L_k)


def _form(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> Formed:
    """A weight of zero does not hide a NaN. Where rows of others are about, the operands go into
    the products without their non-finite rows, whose scores become NaN instead, before the mask.
    """
    kv_heads = k.shape[1]
    q = _grouped(_take(q, piece.rows), kv_heads)
    k, v = (_grouped(_take(x, piece.keys), kv_heads) for x in (k, v))
    poison = None
    if _guarded(piece):
        (q, q_poison), (k, k_poison), (v, v_poison) = map(_harmless, (q, k, v))
        poison = q_poison + (k_poison + v_poison).transpose(-1, -2)
    scores = (q * scale) @ k.transpose(-1, -2)
    if poison is not None:
        scores = scores + poison
    if piece.hidden is None:
        return Formed(q, k, v, scores.softmax(-1))
    weights = _masked(scores, piece, float("-inf")).softmax(-1)
    if piece.mixed:  # rows of no patch see nothing, and a NaN among the seen reaches all weights
        weights = _masked(weights, piece)
    return Formed(q, k, v, weights)


def _guarded(piece: Piece) -> bool:
    return piece.mixed and piece.hidden is not None


def _masked(x: Tensor, piece: Piece, value: float = 0.0) -> Tensor:
    """(n, H_kv, G L_q, L_k) with `value` where a key is hidden from a query."""
    assert piece.hidden is not None
    length = _length(piece.rows)
    n, kv_heads, rows, keys = x.shape
    by_query = x.reshape(n, kv_heads, rows // max(1, length), length, keys)
    return by_query.masked_fill(piece.hidden[:, None, None], value).reshape(x.shape)


def _length(place: Place) -> int:
    return place.stop - place.start if isinstance(place, slice) else place.shape[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> Tensor:
    """(n L_q, H, K)."""
    formed = _form(q, k, v, piece, scale)
    return _ungrouped(formed.weights @ formed.v, _length(piece.rows))


def _padded(x: Tensor) -> Tensor:
    """A row of zeros at the end, for the places that no byte fills."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def _attend_all(q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece], scale: float) -> Tensor:
    """(T, H, K), from ops that torch differentiates any number of times."""
    total = q.shape[0]
    q, k, v = _padded(q), _padded(k), _padded(v)
    out = torch.zeros_like(q)
    for piece in pieces:
        values = _attend(q, k, v, piece, scale)
        if isinstance(piece.rows, slice):
            index = torch.arange(piece.rows.start, piece.rows.stop, device=q.device)
        else:
            index = piece.rows.flatten()
        out = out.index_copy(0, index, values)
    return out[:total]


# The backward that keeps nothing


class _Attention(torch.autograd.Function):
    """Attention whose backward forms the weights again, piece by piece."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_patchlens: Tensor, causal: bool, scale: float
    ) -> Tensor:
        pieces = _pieces_of(cu_patchlens, (q, k, v), q.shape[1], causal)
        total = q.shape[0]
        q, k, v = _padded(q), _padded(k), _padded(v)
        out = torch.zeros_like(q)
        for piece in pieces:
            _write(out, piece.rows, _attend(q, k, v, piece, scale))
        return out[:total]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, cu_patchlens, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, cu_patchlens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_patchlens = ctx.saved_tensors
        pieces = _pieces_of(cu_patchlens, (q, k, v, grads[0]), q.shape[1], ctx.causal)
        derive = _gradients
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            derive = _recorded_gradients
        return *derive(grads[0], q, k, v, pieces, ctx.scale), None, None, None


def _recorded_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece], scale: float
) -> tuple[Tensor, ...]:
    """The gradients through autograd, for somebody who differentiates them again."""
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in (q, k, v)]
    out = _attend_all(leaves[0], leaves[1], leaves[2], pieces, scale)
    if not out.requires_grad:  # no byte is in a patch
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(out, leaves, grad, create_graph=True, materialize_grads=True)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pieces: Iterable[Piece], scale: float
) -> tuple[Tensor, ...]:
    """Of q, k and v; each piece owns its queries, and long patches add to their keys in order."""
    total = q.shape[0]
    grad, q, k, v = _padded(grad), _padded(q), _padded(k), _padded(v)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for piece in pieces:
        formed = _form(q, k, v, piece, scale)
        up, weights = _grouped(_take(grad, piece.rows), k.shape[1]), formed.weights
        if _guarded(piece):
            up, poison = _harmless(up)
            weights = _masked(weights + poison, piece)
        dweights = up @ formed.v.transpose(-1, -2)
        product = weights * dweights
        dscores = product.sub_(weights * product.sum(-1, keepdim=True)).mul_(scale)
        if _guarded(piece):
            dscores = _masked(dscores, piece)
        _write(dq, piece.rows, _ungrouped(dscores @ formed.k, _length(piece.rows)))
        keys = _length(piece.keys)
        _add(dk, piece.keys, _ungrouped(dscores.transpose(-1, -2) @ formed.q, keys))
        _add(dv, piece.keys, _ungrouped(weights.transpose(-1, -2) @ up, keys))
    return dq[:total], dk[:total], dv[:total]


def _write(x: Tensor, place: Place, values: Tensor) -> None:
    if isinstance(place, slice):
        x[place] = values
    else:
        x.index_copy_(0, place.flatten(), values)


def _add(x: Tensor, place: Place, values: Tensor) -> None:
    """Folded patches own their keys; the pieces of a long one share them."""
    if isinstance(place, slice):
        x[place] += values
    else:
        x.index_copy_(0, place.flatten(), values)
