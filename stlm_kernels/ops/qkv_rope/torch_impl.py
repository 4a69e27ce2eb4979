"""qkv_rope in aten ops: whole tensors as torch differentiates them, or on a CPU by chunks of rows.

What is not traced keeps its arguments, results and one over the rms of each normed head. Where the
weight of heads is even enough, the backward takes the normed heads from the results; else it forms
their products again, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd, rotary
from ..._torch.casting import cast

MOST_UNEVEN = 8.0
"""Largest over smallest weight of heads up to which the results tell what was normed: one that is
rotated beside another loses as much of its precision as it is smaller."""
FEW_ROWS = 64
"""Up to here there is too little to keep for a backward of our own."""


class Options(NamedTuple):
    """Sizes and numbers of a call."""

    period: int
    heads: int
    kv_heads: int
    eps: float
    out_dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.out_dtype, torch.float32)

    def split(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """Rows of a weight, or columns of a product, that make queries, keys and values."""
        width = x.shape[dim] // (self.heads + 2 * self.kv_heads)
        return list(x.split([n * width for n in (self.heads, self.kv_heads, self.kv_heads)], dim))


class Heads(NamedTuple):
    """Results."""

    q: Tensor
    k: Tensor
    v: Tensor


class Operands(NamedTuple):
    """Tensors of a call, as in `qkv_rope`."""

    x: Tensor
    norm_weight: Tensor | None
    weight: Tensor
    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    positions: Tensor | None


def qkv_rope(
    x: Tensor,  # (N, D)
    norm_weight: Tensor | None,  # (D,)
    weight: Tensor,  # ((H + 2 H_kv) K, D)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    q_weight: Tensor | None,  # (K,)
    k_weight: Tensor | None,  # (K,)
    positions: Tensor | None,  # (period,)
    period: int,
    heads: int,
    kv_heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in `out_dtype`; row n stands at positions[n % period], without them at that."""
    options = Options(period, heads, kv_heads, eps, out_dtype)
    operands = Operands(x, norm_weight, weight, cos, sin, q_weight, k_weight, positions)
    by_chunks = runtime.values_visible(x) and x.shape[0] > FEW_ROWS
    by_chunks = by_chunks and not runtime.needs_composition(*operands)
    with runtime.without_autocast(x):
        found = _QKVRope.apply(*operands, options) if by_chunks else _composed(operands, options)
    q, k, v = found
    return q, k, v


def _composed(operands: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by ops that torch differentiates any number of times."""
    x, norm_weight, weight, cos, sin, q_weight, k_weight, positions = operands
    wide, out_dtype, eps = options.wide, options.out_dtype, options.eps
    gain = None if norm_weight is None else norm_weight.to(wide)
    normed = F.rms_norm(cast(x, out_dtype, wide), x.shape[-1:], gain, eps).to(out_dtype)
    product = F.linear(normed, cast(weight, out_dtype, out_dtype))
    at = rotary.by_column(*_tables(cos, sin, positions, options), False)
    by_head = product.unflatten(-1, (-1, 2 * cos.shape[1]))
    by_head = by_head.unflatten(0, (-1, max(1, options.period)))
    q, k, v = by_head.split([options.heads, options.kv_heads, options.kv_heads], 2)
    q = rotary.turned(q, q_weight, *at, eps, False, out_dtype)
    k = rotary.turned(k, k_weight, *at, eps, False, out_dtype)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1).contiguous()


def _tables(
    cos: Tensor, sin: Tensor, positions: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(period, 1, K/2) each."""
    found = (rotary.table_rows(t.to(options.wide), positions, options.period) for t in (cos, sin))
    return next(found), next(found)


class _QKVRope(torch.autograd.Function):
    """Elementwise parts chunk by chunk, forward and backward; products whole."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, ctx.options = arguments
        found, scales = _forward(Operands(*operands), ctx.options)
        ctx.save_for_backward(*operands, *found[:2], *scales)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        saved = ctx.saved_tensors  # only once: a checkpoint forms them again for it
        if autograd.is_needed(*grads):

            def compose(*operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
                return _composed(Operands(*operands), options)  # type: ignore[arg-type]

            with runtime.without_autocast(grads[0]):
                found = autograd.gradients(compose, saved[:8], grads)
        else:
            with runtime.without_autocast(grads[0]):
                operands, results = Operands(*saved[:8]), saved[8:]
                found = _gradients(grads, operands, results, options, ctx.needs_input_grad)
        return *found, None


class _Call:
    """Operands cast once, and what chunks of rows make of them."""

    def __init__(self, operands: Operands, options: Options) -> None:
        x, norm_weight, weight, cos, sin, q_weight, k_weight, positions = operands
        self.x, self.options, self.wide = x, options, options.wide
        self.width = 2 * cos.shape[1]
        self.gain = None if norm_weight is None else norm_weight.to(self.wide)
        self.weight = weight.to(options.out_dtype)
        self.head_weights = [None if w is None else w.to(self.wide) for w in (q_weight, k_weight)]
        self.cos, self.sin = _tables(cos, sin, positions, options)

    def chunks(self, elements: int) -> Iterator[tuple[slice, slice]]:
        """Rows of so many elements each, and the places of one period that they stand at."""
        period, count = max(1, self.options.period), self.x.shape[0]
        for batch, rows in rotary.chunks(count // period, period, elements):
            first = batch.start * period
            stop = min(batch.stop * period, count)
            if rows.start or rows.stop < period:
                stop = first + min(rows.stop, period)
                first += rows.start
            yield slice(first, stop), rows

    def rows_of_x(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(rows, D) of x in the wide dtype, and one over the rms of each."""
        x = self.x[rows].to(self.options.out_dtype).to(self.wide)
        return x, rotary.inverse_rms(x, self.options.eps)

    def normed(self) -> Tensor:
        """(N, D) operand of the product."""
        out = torch.empty(self.x.shape, dtype=self.options.out_dtype)
        for rows, _ in self.chunks(self.x.shape[1]):
            x, scales = self.rows_of_x(rows)
            x = x * scales
            out[rows] = x if self.gain is None else x.mul_(self.gain)
        return out

    def tables(self, places: slice) -> tuple[Tensor, Tensor]:
        """(places, 1, K) each, columns' own."""
        return rotary.by_column(self.cos[places], self.sin[places], False)

    def by_head(self, x: Tensor, places: slice) -> Tensor:
        """(batches, places, heads, K) of (rows, heads K)."""
        count = min(places.stop, max(1, self.options.period)) - places.start
        return x.view(-1, count, x.shape[1] // self.width, self.width)


def _forward(operands: Operands, options: Options) -> tuple[Heads, list[Tensor | None]]:
    """Products, turned in place while a chunk of them is in a cache, and one over heads' rms."""
    call = _Call(operands, options)
    normed = call.normed()
    found = [torch.mm(normed, weight.T) for weight in options.split(call.weight)]
    kept: list[Tensor | None] = []
    for out, weight in zip(found, call.head_weights, strict=False):
        heads = out.shape[1] // call.width
        scales = None if weight is None else torch.empty((len(out), heads), dtype=call.wide)
        kept.append(scales)
        for rows, places in call.chunks(out.shape[1]):
            into = call.by_head(out[rows], places)
            part = into.to(call.wide)
            if scales is not None:
                each = rotary.inverse_rms(part, options.eps)
                scales[rows] = each.view(-1, heads)
                part = part * each
            folded = rotary.weighted(*call.tables(places), weight, False)
            into.copy_(rotary.turned_chunk(part, *folded, None, False))
    return Heads(*(y.unflatten(1, (-1, call.width)) for y in found)), kept


def _gradients(
    grads: Sequence[Tensor],
    operands: Operands,
    results: Sequence[Tensor],
    options: Options,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the operands."""
    call = _Call(operands, options)
    normed = call.normed()
    dproduct, of_heads = _dproduct(call, normed, grads, results)
    found: list[Tensor | None] = [*[None] * 5, *of_heads, None]
    if needs[2]:
        found[2] = (dproduct.T @ normed).to(operands.weight.dtype)
    del normed
    if needs[0] or needs[1]:
        found[0], dgain = _through_norm(call, dproduct @ call.weight)
        if operands.norm_weight is not None:
            found[1] = dgain.to(operands.norm_weight.dtype)
    return [x if need else None for x, need in zip(found, needs, strict=False)]


def _dproduct(
    call: _Call, normed: Tensor, grads: Sequence[Tensor], results: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """(N, (H + 2 H_kv) K) gradient of the product, and those of the heads' norms."""
    options = call.options
    out = torch.empty((normed.shape[0], call.weight.shape[0]), dtype=options.out_dtype)
    whole, weights = options.split(out, 1), options.split(call.weight)
    whole[2].copy_(grads[2].flatten(1))
    sums: list[Tensor | None] = []
    for i, weight in enumerate(call.head_weights):
        source = None
        if weight is not None:
            told = _tells_what_was_normed(weight, options)
            source = (
                _FromResults(call, results[i], weight, results[2 + i])
                if told
                else _FromProducts(call, torch.mm(normed, weights[i].T))
            )
        sums.append(_head_gradients(call, grads[i].flatten(1), whole[i], weight, source))
    return out, sums


def _tells_what_was_normed(weight: Tensor, options: Options) -> bool:
    if options.out_dtype.itemsize < 4 or not runtime.values_readable(weight):
        return False
    least, most = weight.abs().aminmax()
    return bool(most <= MOST_UNEVEN * least)


class _FromResults:
    """Heads after their norm, from what they became."""

    def __init__(self, call: _Call, result: Tensor, weight: Tensor, scales: Tensor) -> None:
        self.call, self.result, self.scales = call, result.flatten(1), scales
        self.inverse = weight.reciprocal()

    def __call__(
        self, rows: slice, places: slice, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        turned = self.call.by_head(self.result[rows], places)
        heads = rotary.turned_back(turned, *tables, False).mul_(self.inverse)
        return heads, self.scales[rows].view(*heads.shape[:-1], 1)


class _FromProducts:
    """The same from their products."""

    def __init__(self, call: _Call, product: Tensor) -> None:
        self.call, self.product = call, product

    def __call__(
        self, rows: slice, places: slice, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        heads = self.call.by_head(self.product[rows], places).to(self.call.wide)
        scales = rotary.inverse_rms(heads, self.call.options.eps)
        return heads * scales, scales


def _head_gradients(
    call: _Call,
    up: Tensor,  # (N, H K)
    into: Tensor,  # (N, H K)
    weight: Tensor | None,
    source: _FromResults | _FromProducts | None,
) -> Tensor | None:
    """Write the gradient of the product of some heads; give that of their norm's weight."""
    total = None if weight is None else torch.zeros(call.width, dtype=call.wide)
    for rows, places in call.chunks(up.shape[1]):
        tables = call.tables(places)
        ups = call.by_head(up[rows], places).to(call.wide)
        part = rotary.turned_back(ups, *tables, False)
        if source is not None and total is not None:
            heads, scales = source(rows, places, tables)
            part, along = rotary.norm_gradients(part, heads, weight, scales)
            total += along
        call.by_head(into[rows], places).copy_(part)
    return total


def _through_norm(call: _Call, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of its norm's weight."""
    dx = up if up.dtype == call.x.dtype else torch.empty(up.shape, dtype=call.x.dtype)
    dgain = torch.zeros(up.shape[1], dtype=call.wide)
    for rows, _ in call.chunks(up.shape[1]):
        x, scales = call.rows_of_x(rows)
        part = up[rows].to(call.wide, copy=True)
        dx[rows], along = rotary.norm_gradients(part, x * scales, call.gain, scales)
        dgain += along
    return dx, dgain
