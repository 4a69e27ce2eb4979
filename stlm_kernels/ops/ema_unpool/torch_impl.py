"""ema_unpool in aten ops: the CPU path, and every case until there is a kernel.

The recurrence y[j] = x[j] + decay[j] y[j-1] runs in chunks of CHUNK patches, all chunks at a time:
CHUNK steps from nothing, the ends of the chunks by the same recurrence, and the end before each
chunk handed through it. Nothing is divided and no logarithm taken, so that decays of exactly 0 and
1 are as good as any. Its gradient is the same recurrence from the other end, which makes it
differentiable any number of times. The rows then come from unpool.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ... import runtime
from ..._torch import segments
from ..._torch.casting import cast
from ..._torch.function import Function
from ..unpool.torch_impl import unpool

CHUNK = 8


def ema_unpool(
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    wide = torch.promote_types(out_dtype, torch.float32)
    states, gate = cast(patch_states, out_dtype, wide), gate.to(wide)
    places = torch.arange(gate.shape[0], device=gate.device)
    follows = places > 0
    if cu_seqlens is not None:
        boundaries = segments.clamped_bounds(cu_seqlens, gate.shape[0]).long()
        document, inside = segments.find_segment(boundaries, places)
        first_places = boundaries.index_select(0, (document - 1).clamp(min=0))
        follows = inside & (places > first_places)
        gate = torch.where(inside, gate, 0)
        states = torch.where(inside[:, None], states, 0)
    smoothed = _scanned(gate[:, None] * states, torch.where(follows, 1 - gate, 0), False)
    if residual is not None:
        residual = cast(residual, out_dtype, wide)
    return unpool(smoothed, read_ids, None, residual, wide).to(out_dtype)


class _Scan(Function):
    """y[j] = x[j] + decay[j] y[j-1]; reversed, y[j] = x[j] + decay[j] y[j+1]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (P, D)
        decay: Tensor,  # (P,)
        reverse: bool,
    ) -> Tensor:
        visible = runtime.values_visible(x)
        y = _scan(x, decay, reverse, isolate=not visible)
        if visible and bool(y.sum().isnan()):
            y = _scan(x, decay, reverse, isolate=True)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, decay, ctx.reverse = inputs
        ctx.save_for_backward(decay, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        decay, y = ctx.saved_tensors
        dx = _scanned(grads[0], _shifted(decay, not ctx.reverse), not ctx.reverse)
        ddecay = (dx * _shifted(y, ctx.reverse)).sum(1) if ctx.needs_input_grad[1] else None
        return dx, ddecay, None


class _ScanForward(_Scan):
    """Smooth with tangents, of which Dynamo would trace neither."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Scan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, ddecay: Tensor | None, _: None) -> Tensor:
        """The tangent follows the same recurrence."""
        decay, y = ctx.saved_tensors
        through = torch.zeros_like(y) if dx is None else dx
        if ddecay is not None:
            through = through + ddecay[:, None] * _shifted(y, ctx.reverse)
        return _scanned(through, decay, ctx.reverse)


def _scanned(x: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    function = _ScanForward if runtime.carries_tangents(x, decay) else _Scan
    return function.apply(x, decay, reverse)


def _shifted(x: Tensor, reverse: bool) -> Tensor:
    """Row j is row j-1, or reversed row j+1, and zeros where there is none."""
    if x.shape[0] == 0:
        return x
    nothing = torch.zeros_like(x[:1])
    return torch.cat([x[1:], nothing] if reverse else [nothing, x[:-1]])


def _scan(x: Tensor, decay: Tensor, reverse: bool, isolate: bool) -> Tensor:
    """`isolate`: a decay of 0 keeps even NaN from passing, which costs a pass of its own."""
    count, width = x.shape
    chunks = (count + CHUNK - 1) // CHUNK
    if torch.compiler.is_compiling() or count % CHUNK:  # compiled, one graph for both
        x = torch.cat([x, x.new_zeros(CHUNK, width)])[: chunks * CHUNK]
        decay = torch.cat([decay, decay.new_zeros(CHUNK)])[: chunks * CHUNK]
    decay = decay.view(chunks, CHUNK)
    y = _steps(x.view(chunks, CHUNK, width), decay, reverse, isolate)
    if count > CHUNK:
        reach = _reach(decay.flip(1), isolate).flip(1) if reverse else _reach(decay, isolate)
        end = 0 if reverse else CHUNK - 1
        ends = _scan(y[:, end], reach[:, end], reverse, isolate)
        y = _plus(y, reach[:, :, None], _shifted(ends, reverse)[:, None], isolate)
    return y.view(-1, width)[:count]


def _steps(x: Tensor, decay: Tensor, reverse: bool, isolate: bool) -> Tensor:
    """x (chunks, patches, D), each chunk from nothing."""
    rows, factors = list(x.unbind(1)), decay[:, :, None].unbind(1)
    order = range(len(rows))
    for before, here in pairwise(order[::-1] if reverse else order):
        rows[here] = _plus(rows[here], factors[here], rows[before], isolate)
    return torch.stack(rows, 1)


def _reach(decay: Tensor, isolate: bool) -> Tensor:
    """(chunks, CHUNK): what each place keeps of what came before its chunk."""
    reach = decay.cumprod(1)
    return torch.where((decay == 0).cumsum(1) > 0, 0, reach) if isolate else reach


def _plus(x: Tensor, decay: Tensor, y: Tensor, isolate: bool) -> Tensor:
    """x + decay * y."""
    return x + torch.where(decay == 0, 0, decay * y) if isolate else torch.addcmul(x, decay, y)
