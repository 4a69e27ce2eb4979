"""qkv_rope in aten ops: whole tensors as torch differentiates them, or on a CPU by chunks of rows.

Chunks keep nothing but the arguments: the backward forms the products of normed heads again, while
a chunk of them is in a cache.
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

LEAST_ROWS = 128
"""Rows of a chunk below which its products lose their efficiency."""


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
    by_chunks = x.is_cpu and not torch.compiler.is_compiling()
    by_chunks = by_chunks and x.shape[0] > _most_rows(x, weight)
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


def _most_rows(x: Tensor, weight: Tensor) -> int:
    return max(LEAST_ROWS, rotary.CHUNK_ELEMENTS // max(weight.shape[0], x.shape[1]))


class _QKVRope(torch.autograd.Function):
    """All of it chunk by chunk, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, ctx.options = arguments
        ctx.save_for_backward(*operands)
        return _forward(Operands(*operands), ctx.options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        options: Options = ctx.options
        if autograd.is_needed(*grads):

            def compose(*operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
                return _composed(Operands(*operands), options)  # type: ignore[arg-type]

            with runtime.without_autocast(grads[0]):
                found = autograd.gradients(compose, ctx.saved_tensors, grads)
        else:
            with runtime.without_autocast(grads[0]):
                operands = Operands(*ctx.saved_tensors)
                found = _gradients(grads, operands, options, ctx.needs_input_grad)
        return *found, None


class _Chunks:
    """Operands cast once, and what each chunk makes of them."""

    def __init__(self, operands: Operands, options: Options) -> None:
        x, norm_weight, weight, cos, sin, q_weight, k_weight, positions = operands
        self.x, self.options, wide = x, options, options.wide
        self.width = 2 * cos.shape[1]
        self.gain = None if norm_weight is None else norm_weight.to(wide)
        self.weight = weight.to(options.out_dtype)
        self.q_weight, self.k_weight = (
            None if w is None else w.to(wide) for w in (q_weight, k_weight)
        )
        self.cos, self.sin = _tables(cos, sin, positions, options)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows of x, and the places of one period that they stand at."""
        period, most = max(1, self.options.period), _most_rows(self.x, self.weight)
        for batch, rows in rotary.chunks(self.x.shape[0] // period, period, most):
            first = batch.start * period
            stop = min(batch.stop * period, self.x.shape[0])
            if rows.start or rows.stop < period:
                stop = first + min(rows.stop, period)
                first += rows.start
            yield slice(first, stop), rows

    def normed(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, D) of x in the wide dtype, one over its rms, and the operand of the product."""
        x = self.x[rows].to(self.options.out_dtype).to(self.options.wide)
        scales = rotary.inverse_rms(x, self.options.eps)
        operand = x * scales
        if self.gain is not None:
            operand *= self.gain
        return x, scales, operand.to(self.options.out_dtype)

    def tables(self, places: slice) -> tuple[Tensor, Tensor]:
        """(places, 1, K) each, columns' own."""
        return rotary.by_column(self.cos[places], self.sin[places], False)

    def by_head(self, x: Tensor, places: slice) -> Tensor:
        """(batches, places, heads, K) of (rows, heads K)."""
        count = min(places.stop, max(1, self.options.period)) - places.start
        return x.view(-1, count, x.shape[1] // self.width, self.width)


def _forward(operands: Operands, options: Options) -> Heads:
    chunks = _Chunks(operands, options)
    count = chunks.x.shape[0]
    sizes = (options.heads, options.kv_heads, options.kv_heads)
    q, k, v = (torch.empty((count, n * chunks.width), dtype=options.out_dtype) for n in sizes)
    turned_rows = q.shape[1] + k.shape[1]
    first, last = chunks.weight[:turned_rows], chunks.weight[turned_rows:]
    for rows, places in chunks:
        _, _, operand = chunks.normed(rows)
        torch.mm(operand, last.T, out=v[rows])
        product = operand @ first.T
        tables = chunks.tables(places)
        parts = zip((q, k), product.split([q.shape[1], k.shape[1]], 1), strict=True)
        for (out, part), weight in zip(parts, (chunks.q_weight, chunks.k_weight), strict=True):
            folded = rotary.weighted(*tables, weight, False)
            eps = None if weight is None else options.eps
            part = chunks.by_head(part.to(options.wide), places)
            turned = rotary.turned_chunk(part, *folded, eps, False)
            chunks.by_head(out[rows], places).copy_(turned)
    return Heads(*(y.view(count, -1, chunks.width) for y in (q, k, v)))


def _gradients(
    grads: Sequence[Tensor], operands: Operands, options: Options, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the operands."""
    chunks = _Chunks(operands, options)
    x, wide = operands.x, options.wide
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    sums = {
        i: torch.zeros(operand.shape, dtype=wide)
        for i in (1, 2, 5, 6)
        if needs[i] and (operand := operands[i]) is not None
    }
    ups = [y.flatten(1) for y in grads]
    dproduct = torch.empty(0)
    for rows, places in chunks:
        part, scales, operand = chunks.normed(rows)
        dproduct = _dproduct(chunks, [y[rows] for y in ups], operand, places, sums)
        if 2 in sums:
            _add_product(sums[2], dproduct, operand)
        if dx is None and 1 not in sums:
            continue
        up = (dproduct @ chunks.weight).to(wide)
        drows, along = rotary.norm_gradients(up, part, chunks.gain, scales)
        if dx is not None:
            dx[rows] = drows
        if 1 in sums:
            sums[1] += along
    found: list[Tensor | None] = [dx, *[None] * 7]
    for i, total in sums.items():
        operand = operands[i]
        found[i] = None if operand is None else total.to(operand.dtype)
    return found


def _dproduct(
    chunks: _Chunks,
    ups: Sequence[Tensor],
    operand: Tensor,
    places: slice,
    sums: dict[int, Tensor],
) -> Tensor:
    """(rows, (H + 2 H_kv) K) gradient of the product; adds up those of the heads' norms."""
    options, wide = chunks.options, chunks.options.wide
    out = torch.empty((operand.shape[0], chunks.weight.shape[0]), dtype=options.out_dtype)
    tables = chunks.tables(places)
    each = zip(
        (5, 6), ups, options.split(chunks.weight), options.split(out, 1),
        (chunks.q_weight, chunks.k_weight), strict=False,
    )  # fmt: skip
    for i, up, rows_of_weight, into, weight in each:
        part = None
        if weight is not None:
            part = chunks.by_head((operand @ rows_of_weight.T).to(wide), places)
        up = chunks.by_head(up.to(wide), places)
        turned, along = rotary.chunk_gradients(up, part, weight, *tables, options.eps, False)
        chunks.by_head(into, places).copy_(turned)
        if i in sums and along is not None:
            sums[i] += along
    options.split(out, 1)[2].copy_(ups[2])
    return out


def _add_product(total: Tensor, dproduct: Tensor, operand: Tensor) -> None:
    """Add the gradient of the weight from a chunk's rows."""
    if total.dtype == operand.dtype:
        total.addmm_(dproduct.T, operand)
    else:
        total += dproduct.T @ operand
