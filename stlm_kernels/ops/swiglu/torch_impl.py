"""swiglu in aten ops: whole tensors as torch differentiates them, or on a CPU by chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import autograd
from ..._torch.casting import cast

CHUNK_ELEMENTS = 1 << 20
"""Of the hidden layer at a time on a CPU, 4 MB in fp32: the passes over them stay in a cache."""


def swiglu(
    x: Tensor,  # (T, D)
    norm_weight: Tensor | None,  # (D,)
    gate_up: Tensor,  # (2F, D)
    down: Tensor,  # (D, F)
    residual: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    by_chunks = runtime.values_visible(x) and not runtime.needs_composition(x, gate_up, down)
    options = residual, eps, out_dtype
    with runtime.without_autocast(x):
        if not by_chunks:
            return _composed(x, norm_weight, gate_up, down, *options)
        found: Tensor = _SwiGLU.apply(x, norm_weight, gate_up, down, *options)
    return found


def _composed(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    residual: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """By ops that torch differentiates any number of times."""
    wide = torch.promote_types(out_dtype, torch.float32)
    fine = cast(x, out_dtype, wide)
    weight = None if norm_weight is None else norm_weight.to(wide)
    normed = F.rms_norm(fine, x.shape[-1:], weight, eps).to(out_dtype)
    gate, up = F.linear(normed, cast(gate_up, out_dtype, out_dtype)).chunk(2, -1)
    out = F.linear(F.silu(gate) * up, cast(down, out_dtype, out_dtype))
    return fine.to(out_dtype) + out if residual else out


class _SwiGLU(torch.autograd.Function):
    """Chunk by chunk. Nothing F wide is kept: the backward forms gate and up again, which is one
    product more beside six."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        residual: bool,
        eps: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        pairs, columns = gate_up.to(out_dtype), down.to(out_dtype)
        out = torch.empty(x.shape, dtype=out_dtype)
        for rows in _chunks(x, down):
            part = x[rows].to(out_dtype)
            normed = _normed(part, norm_weight, eps)[0]
            gate, up = (normed @ pairs.mT).chunk(2, -1)
            act = F.silu(gate).mul_(up)
            if residual:
                torch.addmm(part, act, columns.mT, out=out[rows])
            else:
                torch.mm(act, columns.mT, out=out[rows])
        ctx.save_for_backward(x, norm_weight, gate_up, down)
        ctx.options = residual, eps, out_dtype
        return autograd.as_output(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        if autograd.is_needed(*grads):

            def compose(
                x: Tensor, norm_weight: Tensor | None, gate_up: Tensor, down: Tensor
            ) -> Tensor:
                return _composed(x, norm_weight, gate_up, down, *ctx.options)

            return *autograd.gradients(compose, operands, grads), None, None, None
        with runtime.without_autocast(grads[0]):
            given: tuple[Any, ...] = (*operands, *ctx.options, ctx.needs_input_grad)
            found = _gradients(grads[0], *given)
        return *found, None, None, None


def _gradients(
    grad: Tensor,  # (T, D)
    x: Tensor,
    norm_weight: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    residual: bool,
    eps: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, norm_weight, gate_up and down, None where not needed."""
    wide = torch.promote_types(dtype, torch.float32)
    pairs, columns = gate_up.to(dtype), down.to(dtype)
    fine = None if norm_weight is None else norm_weight.to(wide)
    dx = torch.empty(x.shape, dtype=x.dtype) if needs[0] else None
    dnorm = torch.zeros(x.shape[1], dtype=wide) if fine is not None and needs[1] else None
    dpairs, dcolumns = (
        torch.zeros(each.shape, dtype=wide) if needed else None
        for each, needed in zip((gate_up, down), needs[2:4], strict=True)
    )
    for rows in _chunks(x, down):
        part, up_grad = x[rows].to(dtype), grad[rows]
        normed, whitened, scale = _normed(part, norm_weight, eps)
        dgates = _through_gates(up_grad, normed @ pairs.mT, columns, dcolumns)
        _add_product(dpairs, dgates, normed)
        if dx is None and dnorm is None:
            continue
        dnormed = (dgates @ pairs).to(wide)
        if dnorm is not None:
            dnorm += (dnormed * whitened).sum(0)
        if dx is not None:
            dnormed = dnormed if fine is None else dnormed.mul_(fine)
            along = (dnormed * whitened).mean(-1, keepdim=True)
            dnormed.addcmul_(whitened, along, value=-1).mul_(scale)
            dx[rows] = dnormed.add_(up_grad) if residual else dnormed
    sums = ((dnorm, norm_weight), (dpairs, gate_up), (dcolumns, down))
    return [dx, *(None if x is None or of is None else x.to(of.dtype) for x, of in sums)]


def _normed(
    x: Tensor,  # (n, D)
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the product reads, in x's dtype; in fp32 at least the same without a weight, and the
    (n, 1) scales."""
    fine = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vecdot(fine, fine)[:, None].div_(x.shape[1]).add_(eps).rsqrt_()
    whitened = fine * scale
    normed = whitened if norm_weight is None else whitened * norm_weight.to(fine.dtype)
    return normed.to(x.dtype), whitened, scale


def _through_gates(
    grad: Tensor,  # (n, D)
    gates: Tensor,  # (n, 2F)
    columns: Tensor,  # (D, F)
    dcolumns: Tensor | None,  # (D, F), added to
) -> Tensor:
    """(n, 2F) gradient of the gates."""
    gate, up = gates.chunk(2, -1)
    dact, silu = grad @ columns, F.silu(gate)
    _add_product(dcolumns, grad, silu * up)
    dgates = torch.empty_like(gates)
    dgate, dup = dgates.chunk(2, -1)
    torch.mul(dact, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate)
    return dgates


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Add a^T b (of few rows) to the total, in its dtype, where there is one."""
    if total is None:
        return
    if a.dtype == total.dtype:
        torch.addmm(total, a.mT, b, out=total)  # torch counts no FLOPs of addmm_
    else:
        total += a.mT @ b


def _chunks(x: Tensor, down: Tensor) -> Iterator[slice]:
    """Runs of rows whose hidden layers have CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // down.shape[1])
    for first in range(0, x.shape[0], step):
        yield slice(first, first + step)
