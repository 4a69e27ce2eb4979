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
from ..._triton.tiles import finished_logits
from . import config as configs
from .triton_impl import (
    LEAST,
    _column_weights,
    _dlogits,
    _largest_upstream,
    _loss_of,
    _merged,
    _row_targets,
    _row_weights,
    _slopes,
    _statistics,
    column_table,
)

SLICE = 16_384
"""Rows of the weight's gradient that a product is added to at a time."""


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "dloss_stride", "dlse_stride"])
def stlm_linear_logprobs_chunk(
    z_ptr, grad_ptr, bias_ptr, target_ptr, dloss_ptr, dlse_ptr, unit_ptr, loss_ptr, lse_ptr,
    n_rows, valid, pitch, scale, cap, smoothing, z_loss, ignore_index, dloss_stride, dlse_stride,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    target, live, bad = _row_targets(target_ptr, row, n_rows, ignore_index, valid)
    hard, mass = _row_weights(bias_ptr, target, live & ~bad, valid, smoothing, HAS_WEIGHTS)
    top, total = tl.zeros((1,), tl.float32) + LEAST, tl.zeros((1,), tl.float32)
    picked, plain = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for first in range(0, valid, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = _stored_logits(z_ptr, bias_ptr, row, columns, pitch, valid, scale, cap, HAS_BIAS)
        soft = _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS)
        tile_top, tile_total, tile_picked, tile_plain = _statistics(z, columns, target, soft)
        top, total, picked, plain = _merged(
            top, total, picked, plain, tile_top, tile_total, tile_picked, tile_plain
        )
    loss, lse, log_total = _loss_of(top, total, picked, plain, bad, hard, mass, z_loss)
    tl.store(loss_ptr + row, tl.where(live, loss, 0.0))
    tl.store(lse_ptr + row, tl.where(live, lse, 0.0))
    if WITH_GRAD:
        dloss, slope = _slopes(
            dloss_ptr + row * dloss_stride, dlse_ptr + row * dlse_stride, tl.load(unit_ptr),
            live, bad, mass, lse, z_loss,
        )  # fmt: skip
        stored = grad_ptr.dtype.element_ty
        start = row * pitch * (32 // stored.primitive_bitwidth)
        for first in range(0, valid, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = _stored_logits(z_ptr, bias_ptr, row, columns, pitch, valid, scale, cap, HAS_BIAS)
            soft = _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS)
            grad = _dlogits(
                z, columns, target, top, log_total, dloss, slope, hard, soft, valid, cap
            )
            # 16-bit gradients of the first block lie over logits that other threads still load.
            tl.debug_barrier()
            place = grad_ptr + start[None, :] + columns[:, None]
            tl.store(place, grad.to(stored), mask=(columns < pitch)[:, None])


@triton.jit
def _stored_logits(
    z_ptr, bias_ptr, row, columns, pitch, valid, scale, cap, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """(columns, 1) logits of a row from its stored products."""
    place = z_ptr + row[None, :] * pitch + columns[:, None]
    # Up to the pitch: whole vectors. What lies behind the vocabulary becomes -inf.
    products = tl.load(place, mask=(columns < pitch)[:, None], other=0.0)
    return finished_logits(products, bias_ptr, columns, valid, scale, cap, HAS_BIAS)


class Totals(NamedTuple):
    """Results of a walk over all chunks; gradients that are not required are empty."""

    loss: Tensor  # (N,) fp32
    lse: Tensor  # (N,) fp32
    drows: Tensor  # (N, D) in the rows' dtype
    dweight: Tensor  # (V, D) fp32
    dbias: Tensor  # (V,) fp32


def _walk(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    upstream: Sequence[Tensor],  # (N,) twice: losses and lse, of any stride
    unit: Tensor,  # (1,) what the upstream gradients are divided by in the products
    dot_dtype: torch.dtype,
    options: Sequence[Any],
    wants: tuple[bool, ...],
) -> Totals:
    (count, width), vocab, device = rows.shape, weight.shape[0], rows.device
    ignore_index, _, logit_scale, valid, *_ = options
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    out = Totals(
        torch.empty(count, **fp32),
        torch.empty(count, **fp32),
        torch.empty((count, width) if wants[0] else 0, dtype=rows.dtype, device=device),
        torch.zeros((vocab, width) if wants[1] else 0, **fp32),
        torch.zeros(vocab if wants[2] else 0, **fp32),
    )
    table, step = weight[:valid].to(dot_dtype).contiguous(), configs.chunk_rows(valid)
    scratch = torch.empty(min(step, count), configs.pitch_of(valid), **fp32)
    factor = unit * logit_scale
    columns = column_table(bias, class_weight, valid)
    with torch.autocast(device.type, enabled=False):
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            n, target = part.stop - first, targets[part]
            # An ignored row must not spread a NaN through the products.
            counted = (target.long() != ignore_index)[:, None]
            h = torch.where(counted, rows[part], 0).to(dot_dtype)
            _multiply(h, table.t(), scratch[:n, :valid])
            grad = scratch[:n].view(dot_dtype)
            given = (upstream[0][part], upstream[1][part], unit)
            _launch_chunk(
                scratch, grad, columns, target, given, out.loss[part], out.lse[part], options,
                with_weights=class_weight is not None, with_grad=any(wants),
            )  # fmt: skip
            grad = grad[:, :valid]
            if wants[0]:
                dh = torch.empty(n, width, **fp32)
                _multiply(grad, table, dh)
                torch.mul(dh, factor, out=out.drows[part])
            if wants[1]:
                _add_product(out.dweight[:valid], grad.t(), h)
            if wants[2]:
                out.dbias[:valid] += grad.sum(0, dtype=torch.float32)
    out.dweight.mul_(factor)
    out.dbias.mul_(factor)
    return out


def _launch_chunk(
    scratch: Tensor,  # (chunk, pitch) fp32
    grad: Tensor,  # the same memory in the products' dtype
    columns: Tensor | None,
    targets: Tensor,  # (n,)
    upstream: tuple[Tensor, Tensor, Tensor],
    loss: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    options: Sequence[Any],
    with_weights: bool,
    with_grad: bool,
) -> None:
    ignore_index, softcap, logit_scale, valid, smoothing, z_loss = options
    dloss, dlse, unit = upstream
    _launch.launch(
        stlm_linear_logprobs_chunk, targets.shape[0],
        scratch, grad, scratch if columns is None else columns, targets.contiguous(),
        dloss, dlse, unit, loss, lse,
        targets.shape[0], valid, scratch.shape[1], logit_scale, softcap, smoothing, z_loss,
        ignore_index, dloss.stride(0), dlse.stride(0),
        HAS_BIAS=columns is not None, HAS_WEIGHTS=with_weights, WITH_GRAD=with_grad,
        device=scratch.device, **configs.chunk_config(valid, grad.dtype, scratch.device),
    )  # fmt: skip


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in fp32; no CPU multiplies 16-bit operands into that."""
    if a.dtype != out.dtype and a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, likewise."""
    if a.dtype == total.dtype or not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
        return
    # Not every torch adds 16-bit products to an fp32 matrix; slices keep the sum's temporary small.
    for into, rows in zip(total.split(SLICE), a.split(SLICE), strict=True):
        into += torch.mm(rows, b, out_dtype=total.dtype)


def _ones(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The upstream gradients of a plain sum of losses, and their largest."""
    one = torch.ones(1, dtype=torch.float32, device=rows.device)
    return one.expand(rows.shape[0]), torch.zeros_like(one).expand(rows.shape[0]), one


def _unit(largest: Tensor, dot_dtype: torch.dtype) -> Tensor:
    """fp16 holds nothing below 2^-24: there gradients lie in [-256, 256] instead of [-1, 1]."""
    return largest / 256 if dot_dtype == torch.float16 else largest


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
    *upstream, one = _ones(rows)
    head = (rows, weight, targets, bias, class_weight)
    out = _walk(*head, upstream, one, dot_dtype, options, (False,) * 3)
    return out.loss, out.lse


def launch_rows_bwd(
    dloss: Tensor,  # (N,) of any stride
    dlse: Tensor,  # (N,) of any stride
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options_and_wants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias, each in its tensor's dtype; unwanted ones empty."""
    *options, want_rows, want_weight, want_bias = options_and_wants
    wants = (want_rows, want_weight, want_bias)
    unit = _unit(_largest_upstream(dloss, dlse), dot_dtype)
    head = (rows, weight, targets, bias, class_weight)
    out = _walk(*head, (dloss, dlse), unit, dot_dtype, options, wants)
    dbias = out.dbias if bias is None else out.dbias.to(bias.dtype)
    return out.drows, out.dweight.to(weight.dtype), dbias


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
    *options, want_rows, want_weight, want_bias = options_and_wants
    *upstream, one = _ones(rows)
    wants, unit = (want_rows, want_weight, want_bias), _unit(one, dot_dtype)
    head = (rows, weight, targets, bias, class_weight)
    out = _walk(*head, upstream, unit, dot_dtype, options, wants)
    return out.loss.sum(), out.lse, out.drows, out.dweight, out.dbias
