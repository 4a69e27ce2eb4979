"""Row losses for vocabularies above 512 columns: products by torch, one kernel between them.

A chunk of rows that fits a fixed scratch has its logits E H^T written in fp32, with a row pitch of
whole 128 columns; the kernel gives each row a program, which walks it twice: maximum, sum, picked
logit and loss first, then the logits' gradient, in [-1, 1] and in the products' dtype, over the
beginning of the row's own logits. Two more products add it to dE (fp32, over all chunks) and dH;
the upstream gradient's largest magnitude and the scale are applied to their fp32 results.

Floor, N = 12,288, D = 512, V = 50,257, bf16: three products of 1.9 TFLOP = 2.4 ms at 790 TFLOP/s.
These chunks move 4 bytes a logit into memory and 4 + 4 + 2 in the kernel (the second walk finds
part of a row in the L2 cache), 2 + 2 into the products: 18 B x 618 M = 11 GB = 2.6 ms more at
4.3 TB/s, and 206 MB of dE for each chunk of 1,280 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.row_losses import (
    BAD,
    IGNORED,
    LEAST,
    LN2,
    code_of,
    column_weights,
    dlogits,
    finished,
    powers,
    rates,
    target_weights,
    upstream,
)
from . import config as configs
from .dlogits_impl import empty_bias, largest_upstream, multiply, multiply_into
from .triton_impl import Head, head_and_wants, head_of, upstream_of

SLICE = 16_384
"""Rows of the weight's gradient that a product is added to at a time."""


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "dloss_stride", "dlse_stride"])
def stlm_linear_logprobs_chunk(
    z_ptr, grad_ptr, bias_ptr, class_ptr, target_ptr, dloss_ptr, dlse_ptr, unit_ptr, loss_ptr,
    lse_ptr,
    n_rows, pitch, scale, cap, smoothing, z_loss, ignore_index, dloss_stride, dlse_stride,
    VALID: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Four columns side by side make a lane; lanes meet once, at the end of a row.

    Upstream gradients of None are ones for the loss and zeros for the lse.
    """
    row = tl.program_id(0).to(tl.int64)
    code = code_of(tl.load(target_ptr + row).to(tl.int64), row < n_rows, ignore_index, VALID)
    lanes = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tops, totals = tl.full((BLOCK // 4,), LEAST, tl.float32), tl.zeros((BLOCK // 4,), tl.float32)
    plain, softs = tl.zeros((BLOCK // 4,), tl.float32), tl.zeros((BLOCK // 4,), tl.float32)
    z_ptr += row * pitch
    for first in range(0, VALID, BLOCK):
        columns = first + lanes
        z = _stored_logits(z_ptr, bias_ptr, columns, pitch, scale, cap, VALID)
        both = tl.maximum(tops, tl.max(z, 1))
        totals = totals * powers(tops, both) + tl.sum(powers(z, both[:, None]), 1)
        tops = both
        if smoothing is not None:
            soft = column_weights(class_ptr, columns, smoothing, VALID)
            softs += tl.sum(soft, 1)
            plain += tl.sum(tl.where(soft != 0, z * soft, 0.0), 1)
    top = tl.max(tops, 0)
    total = tl.sum(totals * powers(tops, top), 0)
    log_total, hard = tl.log2(total) * LN2, target_weights(class_ptr, code, smoothing)
    # Where there is no target its column is the first.
    named = tl.where((code >= 0) & (code < VALID), code, 0)
    picked = _stored_logits(z_ptr, bias_ptr, named, pitch, scale, cap, VALID)
    # Differences from the largest logit first: a confident row's loss keeps its digits.
    mass = hard + tl.sum(softs, 0)
    loss = mass * log_total + hard * (top - picked)
    if smoothing is not None:
        loss += tl.sum(softs, 0) * top - tl.sum(plain, 0)
    if z_loss is not None:
        loss += z_loss * (top + log_total) * (top + log_total)
    live = code != IGNORED
    tl.store(loss_ptr + row, tl.where(live, tl.where(code == BAD, float("nan"), loss), 0.0))
    tl.store(lse_ptr + row, tl.where(live, top + log_total, 0.0))
    if WITH_GRAD:
        dloss = upstream(dloss_ptr, None, unit_ptr, row, 0, code, dloss_stride)
        rate = rates(dloss, dlse_ptr, unit_ptr, row, 0, dlse_stride, code, top, total, mass, z_loss)
        grad_ptr += row * pitch * (32 // grad_ptr.dtype.element_ty.primitive_bitwidth)
        for first in range(0, VALID, BLOCK):
            columns = first + lanes
            z = _stored_logits(z_ptr, bias_ptr, columns, pitch, scale, cap, VALID)
            soft = None
            if smoothing is not None:
                soft = column_weights(class_ptr, columns, smoothing, VALID)
            after = scale if unit_ptr is None else None
            grad = dlogits(z, top, rate, dloss, hard, soft, columns, code, after, cap, VALID, False)
            # 16-bit gradients of the first block lie over logits that other threads still load.
            tl.debug_barrier()
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=columns < pitch)


@triton.jit
def _stored_logits(z_ptr, bias_ptr, columns, pitch, scale, cap, VALID: tl.constexpr):
    """Logits of a row from its stored products."""
    # Up to the pitch: whole vectors. What lies behind the vocabulary becomes -inf.
    products = tl.load(z_ptr + columns, mask=columns < pitch, other=0.0)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < VALID, other=0.0).to(tl.float32)
    return finished(products, bias, columns, scale, cap, VALID, False)


class Totals(NamedTuple):
    """Results of a walk over all chunks; gradients that are not required are empty."""

    loss: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp32
    drows: Tensor  # (N, D) in the rows' dtype
    dweight: Tensor  # (V, D) fp32
    dbias: Tensor  # (V,) fp32


def _walk(
    head: Head,
    operands: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],  # (N,) twice: losses and lse, of any stride
    unit: Tensor | None,  # (1,) what the upstream gradients are divided by in the products
    dot_dtype: torch.dtype,
    wants: Sequence[bool],
) -> Totals:
    rows, weight, targets, *_ = operands
    assert rows is not None
    assert weight is not None
    assert targets is not None
    (count, width), vocab, device = rows.shape, weight.shape[0], rows.device
    valid = head.shape["VALID"]
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    out = Totals(
        torch.empty(count, **fp32),
        torch.empty(count, **fp32),
        torch.empty((count, width) if wants[0] else 0, dtype=rows.dtype, device=device),
        torch.zeros((vocab, width) if wants[1] else 0, **fp32),
        torch.zeros(vocab if wants[2] else 0, **fp32),
    )
    table, step = head.table[:valid], configs.chunk_rows(valid)
    scratch = torch.empty(min(step, count), configs.pitch_of(valid), **fp32)
    factor = unit if unit is None or head.scale is None else unit * head.scale
    with torch.autocast(device.type, enabled=False):
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            n, target = part.stop - first, targets[part]
            # An ignored row must not spread a NaN through the products.
            counted = (target.long() != head.ignore_index)[:, None]
            h = torch.where(counted, rows[part], 0).to(dot_dtype)
            multiply(h, table.t(), scratch[:n, :valid])
            grad = scratch[:n].view(dot_dtype)
            given = (*(None if x is None else x[part] for x in upstream), unit)
            results = (out.loss[part], out.lse[part])
            _launch_chunk(head, scratch, grad, target, given, results, with_grad=any(wants))
            grad = grad[:, :valid]
            if wants[0]:
                multiply_into(out.drows[part], grad, table, factor)
            if wants[1]:
                _add_product(out.dweight[:valid], grad.t(), h)
            if wants[2]:
                out.dbias[:valid] += grad.sum(0, dtype=torch.float32)
    if factor is not None:
        out.dweight.mul_(factor)
        out.dbias.mul_(factor)
    return out


def _launch_chunk(
    head: Head,
    scratch: Tensor,  # (chunk, pitch) fp32
    grad: Tensor,  # the same memory in the products' dtype
    targets: Tensor,  # (n,)
    upstream: Sequence[Tensor | None],  # of losses and lse, and the unit
    results: Sequence[Tensor],  # (n,) losses and lse
    with_grad: bool,
) -> None:
    valid, strides = head.shape["VALID"], [0 if x is None else x.stride(0) for x in upstream[:2]]
    _launch.launch(
        stlm_linear_logprobs_chunk, targets.shape[0],
        scratch, grad, *head.operands[2:4], targets.contiguous(), *upstream, *results,
        targets.shape[0], scratch.shape[1], *head.options, *strides,
        VALID=valid, WITH_GRAD=with_grad, device=scratch.device,
        **configs.chunk_config(valid, grad.dtype, scratch.device),
    )  # fmt: skip


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32; no CPU adds 16-bit products to that."""
    if a.dtype == total.dtype or not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
        return
    # Not every torch adds 16-bit products to an fp32 matrix; slices keep the sum's temporary small.
    for into, rows in zip(total.split(SLICE), a.split(SLICE), strict=True):
        into += torch.mm(rows, b, out_dtype=total.dtype)


def launch_rows(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) fp32."""
    operands = (rows, weight, targets, bias, class_weight)
    head = head_of(*operands, dot_dtype, *options)
    out = _walk(head, operands, (None, None), None, dot_dtype, (False,) * 3)
    return out.loss, out.lse


def launch_rows_bwd(
    dloss: Tensor | None,  # (N,) of any stride
    dlse: Tensor | None,  # (N,) of any stride
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options_and_wants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias, each in its tensor's dtype; unwanted ones empty."""
    operands = (rows, weight, targets, bias, class_weight)
    head, wants = head_and_wants(operands, dot_dtype, options_and_wants)
    dloss = upstream_of(dloss, rows)
    # fp16 holds nothing below 2^-24: there gradients lie in [-256, 256] instead of [-1, 1].
    unit = largest_upstream(dloss, dlse) / 256 if dot_dtype == torch.float16 else None
    out = _walk(head, operands, (dloss, dlse), unit, dot_dtype, wants)
    return out.drows, out.dweight.to(weight.dtype), out.dbias.to(empty_bias(rows, bias).dtype)


def launch_sum(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options_and_wants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of losses, the lse, and the sum's gradients as they are before the upstream one."""
    operands = (rows, weight, targets, bias, class_weight)
    head, wants = head_and_wants(operands, dot_dtype, options_and_wants)
    unit = None
    if dot_dtype == torch.float16:
        unit = torch.full((1,), 1 / 256, dtype=torch.float32, device=rows.device)
    out = _walk(head, operands, (None, None), unit, dot_dtype, wants)
    return out.loss.sum(), out.lse, out.drows, out.dweight, out.dbias
