"""patch_attention in aten ops: torch's flash attention on a CPU (`folded`), else in blocks whose
scores stay small.

Blocks serve GPUs, non-finite operands that flash attention would hide or show, and a backward that
is itself differentiated. Where the boundaries may be read, patches of similar length (up to a power
of two) fold into a batch, and a patch too long for that is cut into blocks of queries: work stays
near the sum of the squared lengths, memory near the operands. Where they cannot (compile,
torch.func, shapes alone), a block of queries meets every row under a mask: static shapes, work T
squared.

The backward forms each block's weights again, so that nothing of size n squared is kept; where it
is itself differentiated, or takes many gradients at once, it goes through the plain composition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import runtime
from ..._torch import attention_blocks, autograd, segments
from ..._torch.attention_blocks import (
    BLOCK_SCORES,
    LEAST_ROWS,
    Block,
    Rule,
    attend,
    attend_plainly,
    gradients,
)
from ..._torch.casting import cast
from ..._torch.function import Function
from . import folded


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
    q, k, v = (cast(x, out_dtype, wide) for x in (q, k, v))
    with runtime.without_autocast(q):
        if runtime.needs_composition(q, k, v):
            out = _attend_plainly(q, k, v, cu_patchlens, causal, scale)
        elif _folds(q, k, v, cu_patchlens, causal):
            return _Folded.apply(q, k, v, cu_patchlens, causal, scale).to(out_dtype)
        else:
            out = _Attention.apply(q, k, v, cu_patchlens, causal, scale)
    return out.to(out_dtype, copy=True)  # `out` is a view, which cannot be changed in place


def _folds(q: Tensor, k: Tensor, v: Tensor, cu_patchlens: Tensor, causal: bool) -> bool:
    """Return whether torch's flash attention gives what is promised, of NaN and infinities too."""
    if not runtime.values_visible(q, k, v, cu_patchlens):
        return False
    # It takes a query of NaN for one that sees nothing; causal, it lets masked rows through.
    return _finite(cu_patchlens, *((q, k, v) if causal else (q,)))


def _finite(cu_patchlens: Tensor, *tensors: Tensor) -> bool:
    covered = int(cu_patchlens[-1])
    return attention_blocks.all_finite(*(x[:covered] for x in tensors))


# Cutting the work into blocks


def _blocks_of(
    cu_patchlens: Tensor, tensors: tuple[Tensor, ...], heads: int, causal: bool
) -> Iterator[Block]:
    total = tensors[0].shape[0]
    if not runtime.values_readable(cu_patchlens):
        return _static_blocks(cu_patchlens, total, heads, causal)
    # Only rows that other rows must not see can do harm, and only with NaN or infinity in them.
    mixed = attention_blocks.may_be_mixed(*tensors)
    return _ragged_blocks(cu_patchlens, total, heads, causal, mixed)


def _ragged_blocks(
    cu_patchlens: Tensor, total: int, heads: int, causal: bool, mixed: bool
) -> Iterator[Block]:
    """Patches by the power of two above their length; row `total` fills the places left over."""
    boundaries = cu_patchlens.clamp(0, total).cpu().long().cummax(0).values
    starts, lengths = boundaries[:-1], boundaries.diff()
    size = 1
    longest = int(lengths.max()) if lengths.numel() else 0
    while size < 2 * longest and heads * size * size <= BLOCK_SCORES:
        here = (lengths > size // 2) & (lengths <= size)
        if bool(here.any()):
            step = BLOCK_SCORES // (heads * size * size)
            parts = zip(starts[here].split(step), lengths[here].split(step), strict=True)
            for start, length in parts:
                block = _folded(start, length, size, total, causal, mixed)
                yield _moved(block, cu_patchlens.device)
        size *= 2
    for patch in (lengths > size // 2).nonzero().flatten().tolist():
        start, end = int(boundaries[patch]), int(boundaries[patch + 1])
        yield from _long_blocks(start, end, heads, causal, mixed, cu_patchlens.device)


def _folded(
    starts: Tensor, lengths: Tensor, size: int, total: int, causal: bool, mixed: bool
) -> Block:
    slots = torch.arange(size)
    beyond = slots >= lengths[:, None]
    rows = torch.where(beyond, total, starts[:, None] + slots)
    masked = beyond[:, None] if bool(beyond.any()) else None
    if causal:
        later = (slots[None, :] > slots[:, None])[None]
        masked = later if masked is None else masked | later
    return Block(rows, rows, masked, mixed)


def _moved(block: Block, device: torch.device) -> Block:
    if device.type == "cpu":
        return block
    rows = block.rows.to(device) if isinstance(block.rows, Tensor) else block.rows
    masked = None if block.masked is None else block.masked.to(device)
    return Block(rows, rows, masked, block.mixed)


def _long_blocks(
    start: int, end: int, heads: int, causal: bool, mixed: bool, device: torch.device
) -> Iterator[Block]:
    step = max(LEAST_ROWS, BLOCK_SCORES // (heads * (end - start)))
    for first in range(start, end, step):
        last = min(end, first + step)
        masked, limit = None, end
        if causal:
            limit = last
            rows = torch.arange(first, last, device=device)
            masked = (torch.arange(start, limit, device=device) > rows[:, None])[None]
        yield Block(slice(first, last), slice(start, limit), masked, mixed)


def _static_blocks(cu_patchlens: Tensor, total: int, heads: int, causal: bool) -> Iterator[Block]:
    boundaries = segments.clamped_bounds(cu_patchlens, total).long()
    rows = torch.arange(total, device=cu_patchlens.device)
    patch, alive = segments.find_segment(boundaries, rows)
    step = max(LEAST_ROWS, BLOCK_SCORES // max(1, heads * total))
    for first in range(0, total, step):
        part = slice(first, min(total, first + step))
        masked = (patch[part, None] != patch) | ~alive
        if causal:
            masked = masked | (rows > rows[part, None])
        yield Block(part, slice(0, total), masked[None], True)


def _padded(x: Tensor) -> Tensor:
    """A row of zeros at the end, for the places that no byte fills."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


class _Folded(torch.autograd.Function):
    """Flash attention with its own backward, until that is differentiated itself."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_patchlens: Tensor, causal: bool, scale: float
    ) -> Tensor:
        ctx.folds, ctx.causal, ctx.scale = folded.folds_of(cu_patchlens), causal, scale
        out, ctx.sums = folded.attend(q, k, v, ctx.folds, causal, scale)
        ctx.save_for_backward(q, k, v, cu_patchlens, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_patchlens, out = ctx.saved_tensors
        blocks = autograd.is_needed(*grads) or (ctx.causal and not _finite(cu_patchlens, *grads))
        if blocks:
            derived = _gradients(grads[0], q, k, v, cu_patchlens, ctx.causal, ctx.scale)
        else:
            derived = folded.gradients(
                grads[0], q, k, v, out, ctx.sums, ctx.folds, ctx.causal, ctx.scale
            )
        return *derived, None, None, None


class _Attention(Function):
    """Attention whose backward forms the weights again, block by block."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_patchlens: Tensor, causal: bool, scale: float
    ) -> Tensor:
        blocks = _blocks_of(cu_patchlens, (q, k, v), q.shape[1], causal)
        return attend(_padded(q), _padded(k), _padded(v), blocks, Rule(scale))[:-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, cu_patchlens, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, cu_patchlens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_patchlens = ctx.saved_tensors
        derived = _gradients(grads[0], q, k, v, cu_patchlens, ctx.causal, ctx.scale)
        return *derived, None, None, None


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_patchlens: Tensor,
    causal: bool,
    scale: float,
) -> Sequence[Tensor | None]:
    """Gradients of q, k and v, block by block."""
    with runtime.without_autocast(q):
        if autograd.is_needed(grad):
            attend = partial(_attend_plainly, cu_patchlens=cu_patchlens, causal=causal, scale=scale)
            return autograd.gradients(attend, (q, k, v), (grad,))
        blocks = _blocks_of(cu_patchlens, (q, k, v, grad), q.shape[1], causal)
        grad, q, k, v = (_padded(x) for x in (grad, q, k, v))
        return [x[:-1] for x in gradients(grad, q, k, v, blocks, Rule(scale))]


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, cu_patchlens: Tensor, causal: bool, scale: float
) -> Tensor:
    blocks = _blocks_of(cu_patchlens, (q, k, v), q.shape[1], causal)
    return attend_plainly(_padded(q), _padded(k), _padded(v), blocks, Rule(scale))[:-1]
