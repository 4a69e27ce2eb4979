"""Attention in aten ops, block by block: some queries against all the keys that they can see.

An op cuts its rows into blocks whose scores stay small; here is what is done with each. Nothing of
the size of all scores is kept: the backward forms each block's weights again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from .random_bits import hashed

BLOCK_SCORES = 1 << 20
"""Scores formed at a time: 4 MB in fp32 stay in a core's cache between the passes over them."""
LEAST_ROWS = 16
"""Queries below which the products of a very long patch lose their efficiency."""

Place = Tensor | slice


class Block(NamedTuple):
    """Some queries and all the keys that they can see; -> n patches side by side."""

    rows: Place  # (n, L_q) positions, or a range (n = 1)
    keys: Place  # (n, L_k)
    masked: Tensor | None  # (n or 1, L_q or 1, L_k) bool, True: not seen; None: all are seen
    mixed: bool  # what is masked may hold NaN, or a row sees nothing: masked scores do not suffice


class Rule(NamedTuple):
    """Options by which scores become weights."""

    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None  # () int64, of the dropout


class Formed(NamedTuple):
    """The operands of a block, (n, H_kv, rows, K), and its weights, (n, H_kv, G L_q, L_k)."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    slope: Tensor | None  # of the softcap
    kept: Tensor | None  # 1 / (1 - p) where the dropout keeps a weight, else 0


def may_be_mixed(*tensors: Tensor) -> bool:
    """Return whether masked rows may hold NaN; true where looking would cost a synchronisation."""
    return not (runtime.values_visible(*tensors) and all_finite(*tensors))


def all_finite(*tensors: Tensor) -> bool:
    """Read the values; a sum is the fastest look at all of them."""
    return all(bool(x.sum().isfinite()) for x in tensors)


def take(x: Tensor, place: Place) -> Tensor:
    """(n, L, H, K) of (T, H, K)."""
    if isinstance(place, slice):
        return x[place][None]
    return x.index_select(0, place.flatten()).view(*place.shape, *x.shape[1:])


def length_of(place: Place) -> int:
    return place.stop - place.start if isinstance(place, slice) else place.shape[1]


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


Operands = tuple[Tensor, Tensor, Tensor]
"""q (n, L_q, H, K), k and v (n, L_k, H_kv, K) of a block."""


def _form(operands: Operands, block: Block, rule: Rule) -> Formed:
    """A weight of zero does not hide a NaN. Where rows of others are about, the operands go into
    the products without their non-finite rows, whose scores become NaN instead, before the mask.
    """
    kv_heads = operands[1].shape[2]
    q, k, v = (_grouped(x, kv_heads) for x in operands)
    poison = slope = kept = None
    if _guarded(block):
        (q, q_poison), (k, k_poison), (v, v_poison) = map(_harmless, (q, k, v))
        poison = q_poison + (k_poison + v_poison).transpose(-1, -2)
    scores = (q * rule.scale) @ k.transpose(-1, -2)
    if rule.softcap is not None:
        bent = (scores / rule.softcap).tanh()
        scores, slope = rule.softcap * bent, 1 - bent * bent
    if poison is not None:
        scores = scores + poison
    if block.masked is not None:
        scores = _masked(scores, block, float("-inf"))
    weights = scores.softmax(-1)
    if _guarded(block):  # a row may see nothing, and a NaN that is seen reaches all weights
        weights = _masked(weights, block)
    if rule.dropout_p:
        kept = _kept(block, weights, rule)
    return Formed(q, k, v, weights, slope, kept)


def _kept(block: Block, weights: Tensor, rule: Rule) -> Tensor:
    """Draw by seed, head, row and key alone, so that the backward draws the same again."""
    n, kv_heads, grouped_rows, _ = weights.shape
    rows, keys = (positions(place, weights.device) for place in (block.rows, block.keys))
    group = grouped_rows // max(1, length_of(block.rows))
    heads = torch.arange(kv_heads * group, device=weights.device).view(kv_heads, group, 1)
    row_ids = (heads << 40) ^ rows[:, None, None, :]
    assert rule.seed is not None
    bits = hashed(rule.seed, row_ids.reshape(n, kv_heads, grouped_rows, 1), keys[:, None, None])
    kept = (bits & 0xFFFFFF) >= rule.dropout_p * 2**24
    return kept.to(weights.dtype) / max(1 - rule.dropout_p, 2.0**-24)


def positions(place: Place, device: torch.device) -> Tensor:
    """(n, L) int64."""
    if isinstance(place, slice):
        return torch.arange(place.start, place.stop, device=device)[None]
    return place


def _guarded(block: Block) -> bool:
    return block.mixed and block.masked is not None


def _masked(x: Tensor, block: Block, value: float = 0.0) -> Tensor:
    """(n, H_kv, G L_q, L_k) with `value` where a key is masked from a query."""
    assert block.masked is not None
    length = length_of(block.rows)
    n, kv_heads, rows, keys = x.shape
    by_query = x.reshape(n, kv_heads, rows // max(1, length), length, keys)
    return by_query.masked_fill(block.masked[:, None, None], value).reshape(x.shape)


def _attend(operands: Operands, block: Block, rule: Rule) -> Tensor:
    """(n L_q, H, K)."""
    formed = _form(operands, block, rule)
    weights = formed.weights if formed.kept is None else formed.weights * formed.kept
    return _ungrouped(weights @ formed.v, length_of(block.rows))


def _taken(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Operands:
    return take(q, block.rows), take(k, block.keys), take(v, block.keys)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], rule: Rule) -> Tensor:
    """(T, H, K), from ops that torch differentiates any number of times; zeros outside blocks."""
    blocks = list(blocks)
    if not blocks:
        return torch.zeros_like(q)
    rows, keys = [block.rows for block in blocks], [block.keys for block in blocks]
    operands = zip(_take_all(q, rows), _take_all(k, keys), _take_all(v, keys), strict=True)
    values = [_attend(x, block, rule) for x, block in zip(operands, blocks, strict=True)]
    places = [positions(place, q.device).flatten() for place in rows]
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(values))


def _take_all(x: Tensor, places: list[Place]) -> list[Tensor]:
    """`take` for each place, cut once: the gradient of a cut is as large as what was cut."""
    by_index = [place for place in places if isinstance(place, Tensor)]
    sizes = [place.numel() for place in by_index]
    gathered: Iterator[Tensor] = iter(())
    if by_index:
        rows = torch.cat([place.flatten() for place in by_index])
        gathered = iter(x.index_select(0, rows).split(sizes))
    ranges = [place for place in places if isinstance(place, slice)]
    edges = sorted({0, x.shape[0]}.union(*((place.start, place.stop) for place in ranges)))
    chunks = x.split([b - a for a, b in pairwise(edges)])
    index = {edge: i for i, edge in enumerate(edges)}

    def taken(place: Place) -> Tensor:
        if isinstance(place, Tensor):
            return next(gathered).view(*place.shape, *x.shape[1:])
        covered = chunks[index[place.start] : index[place.stop]]
        return torch.cat(covered or [x[:0]])[None]

    return [taken(place) for place in places]


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], rule: Rule) -> Tensor:
    """(T, H, K); the result of each block goes where it belongs at once."""
    out = torch.zeros_like(q)
    for block in blocks:
        _write(out, block.rows, _attend(_taken(q, k, v, block), block, rule))
    return out


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a block owns its queries, and blocks given by ranges add to keys."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in blocks:
        formed = _form(_taken(q, k, v, block), block, rule)
        up, weights = _grouped(take(grad, block.rows), k.shape[1]), formed.weights
        if _guarded(block):
            up, poison = _harmless(up)
            weights = _masked(weights + poison, block)
        dweights = up @ formed.v.transpose(-1, -2)
        if formed.kept is not None:
            dweights = dweights * formed.kept
        product = weights * dweights
        dscores = product.sub_(weights * product.sum(-1, keepdim=True)).mul_(rule.scale)
        if formed.slope is not None:
            dscores = dscores * formed.slope
        if formed.kept is not None:
            weights = weights * formed.kept
        if _guarded(block):
            dscores = _masked(dscores, block)
        _write(dq, block.rows, _ungrouped(dscores @ formed.k, length_of(block.rows)))
        keys = length_of(block.keys)
        _add(dk, block.keys, _ungrouped(dscores.transpose(-1, -2) @ formed.q, keys))
        _add(dv, block.keys, _ungrouped(weights.transpose(-1, -2) @ up, keys))
    return dq, dk, dv


def _write(x: Tensor, place: Place, values: Tensor) -> None:
    if isinstance(place, slice):
        x[place] = values
    else:
        x.index_copy_(0, place.flatten(), values)


def _add(x: Tensor, place: Place, values: Tensor) -> None:
    """Folded patches own their keys; blocks by ranges may share them."""
    if isinstance(place, slice):
        x[place] += values
    else:
        x.index_copy_(0, place.flatten(), values)


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Queries and a factor > 0 of the same scores; None is K^-0.5.

    The kernels and SDPA under a mask, which they scale as well, take no other.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if factor > 0:
        return q, factor
    return q * (-1 if factor < 0 else 0), -factor or 1.0
