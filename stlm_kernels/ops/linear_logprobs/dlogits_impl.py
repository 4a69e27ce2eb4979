"""Gradients of the row losses through the logits' gradient G in memory; dE = G^T H, dH = G E.

`dlogits` forms the logits of a block of rows again and stores G, with upstream gradient and scale
within (in fp16, which holds nothing small, they follow the products). dH is torch's product;
`bwd_weight` owns all columns by BLOCK_W of dE for one run of rows, where rows that do not count are
zeros even if they hold NaN, and partial sums of runs are added in a fixed order.

Floor, N = 65,536, D = 512, V = 256, bf16: three products of 17 GFLOP = 65 us at 790 TFLOP/s; 67 MB
of rows read twice and written once, 34 MB of G written once and read twice = 70 us at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.row_losses import (
    IGNORED,
    both_logits,
    dlogits,
    hidden_tile,
    rates,
    row_codes,
    smoothing_weights,
    sum_of_powers,
    tables,
    target_weights,
    upstream,
)
from ..._triton.tiles import sum_splits
from . import config as configs
from .triton_impl import Head, head_and_wants, upstream_of


@triton.jit(do_not_specialize=["n_rows", "programs", "ignore_index", "dloss_stride", "dlse_stride"])
def stlm_linear_logprobs_dlogits(
    h_ptr, w_ptr, bias_ptr, class_ptr, target_ptr, dloss_ptr, dlse_ptr, divisor_ptr, unit_ptr,
    grad_ptr,
    n_rows, programs, scale, cap, smoothing, z_loss, ignore_index, dloss_stride, dlse_stride,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, PITCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Upstream gradients that never came are None, and so is a unit of 1."""
    local = tl.arange(0, BLOCK_N)
    table, rest = tables(w_ptr, D, VALID, DOT, MAIN, TAIL, BLOCK_D)
    soft, soft_rest, soft_total = smoothing_weights(class_ptr, smoothing, VALID, MAIN, TAIL)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), programs):
        first = tl.cast(block, tl.int64) * BLOCK_N
        inside = local < n_rows - first
        codes = row_codes(target_ptr, first, local, inside, ignore_index, VALID)
        z, y, top = both_logits(
            h_ptr, w_ptr, bias_ptr, table, rest, first, local, codes != IGNORED, scale, cap,
            D, VALID, DOT, MAIN, TAIL, BLOCK_D,
        )  # fmt: skip
        total = sum_of_powers(z, y, top, TAIL)
        hard = target_weights(class_ptr, codes, smoothing)
        dloss = upstream(dloss_ptr, divisor_ptr, unit_ptr, first, local, codes, dloss_stride)
        rate = rates(
            dloss, dlse_ptr, unit_ptr, first, local, dlse_stride, codes, top, total,
            hard + soft_total, z_loss,
        )  # fmt: skip
        after = scale if unit_ptr is None else None
        codes, top, rate, dloss, hard = (
            codes[:, None], top[:, None], rate[:, None], dloss[:, None], hard[:, None]
        )  # fmt: skip
        grad = dlogits(
            z, top, rate, dloss, hard, None if smoothing is None else soft[None, :],
            tl.arange(0, MAIN)[None, :], codes, after, cap, VALID, MAIN <= VALID,
        )  # fmt: skip
        place = grad_ptr + first * PITCH + (local[:, None] * PITCH + tl.arange(0, MAIN)[None, :])
        mask = inside[:, None] & (tl.arange(0, MAIN) < PITCH)[None, :]
        tl.store(place, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if TAIL > 0:
            tail = MAIN + tl.arange(0, TAIL)
            grad = dlogits(
                y, top, rate, dloss, hard, None if smoothing is None else soft_rest[None, :],
                tail[None, :], codes, after, cap, VALID, False,
            )  # fmt: skip
            place = grad_ptr + first * PITCH + (local[:, None] * PITCH + tail[None, :])
            mask = inside[:, None] & (tail < PITCH)[None, :]
            tl.store(place, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "run", "ignore_index"])
def stlm_linear_logprobs_bwd_weight(
    h_ptr, grad_ptr, target_ptr, dw_ptr, db_ptr, n_rows, run, ignore_index,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, PITCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The bias's gradient is stored where db_ptr is not None."""
    program, local = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    d_tiles: tl.constexpr = (D + BLOCK_W - 1) // BLOCK_W
    split, d = (
        program // d_tiles,
        (program % d_tiles).to(tl.int32) * BLOCK_W + tl.arange(0, BLOCK_W),
    )
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    dmain, db = tl.zeros((MAIN, BLOCK_W), tl.float32), tl.zeros((MAIN,), tl.float32)
    if TAIL > 0:
        dtail, db_tail = tl.zeros((TAIL, BLOCK_W), tl.float32), tl.zeros((TAIL,), tl.float32)
    for first in range(split * run, tl.minimum((split + 1) * run, n_rows), BLOCK_N):
        inside = local < n_rows - first
        live = row_codes(target_ptr, first, local, inside, ignore_index, VALID) != IGNORED
        # Not in the load's mask: a mask that is loaded itself leaves the loop's copies a buffer
        # short (the compiled lane shows a product that reads what is being overwritten).
        h = hidden_tile(h_ptr, first, local, inside, d, D, DOT)
        h = tl.where(live[:, None], h, 0.0)
        place = grad_ptr + first * PITCH + local[:, None] * PITCH
        if TAIL > 0:
            mask = inside[:, None] & (tail < PITCH)[None, :]
            grad = tl.load(place + tail[None, :], mask=mask, other=0.0)
            dtail = tl.dot(tl.trans(grad), h, dtail, input_precision="ieee")
            if db_ptr is not None:
                db_tail += tl.sum(grad.to(tl.float32), 0)
        mask = inside[:, None] & (main < PITCH)[None, :]
        grad = tl.load(place + main[None, :], mask=mask, other=0.0)
        dmain = tl.dot(tl.trans(grad), h, dmain, input_precision="ieee")
        if db_ptr is not None:
            db += tl.sum(grad.to(tl.float32), 0)
    place = dw_ptr + split * VALID * D + d[None, :]
    tl.store(place + main[:, None] * D, dmain, mask=(d < D)[None, :] & (main < VALID)[:, None])
    if TAIL > 0:
        tl.store(place + tail[:, None] * D, dtail, mask=(d < D)[None, :] & (tail < VALID)[:, None])
    if db_ptr is not None:
        # Programs of other columns of D hold the same sums; storing them again changes nothing.
        tl.store(db_ptr + split * VALID + main, db, mask=main < VALID)
        if TAIL > 0:
            tl.store(db_ptr + split * VALID + tail, db_tail, mask=tail < VALID)


def launch_bwd(
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
    """Gradients of rows, weight and bias, each in its tensor's dtype; unwanted ones are empty."""
    operands = (rows, weight, targets, bias, class_weight)
    head, wants = head_and_wants(operands, dot_dtype, options_and_wants)
    dloss = upstream_of(dloss, rows)
    return through_dlogits(head, operands, (dloss, dlse, None), dot_dtype, wants)


def through_dlogits(
    head: Head,
    operands: Sequence[Tensor | None],
    given: tuple[Tensor, Tensor | None, Tensor | None],  # dloss and dlse (N,), divisor 0-d
    dtype: torch.dtype,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight, _, bias, _ = operands
    assert rows is not None
    assert weight is not None
    valid = head.shape["VALID"]
    unit = largest_upstream(*given) if dtype == torch.float16 else None
    factor = unit if unit is None or head.scale is None else unit * head.scale
    table, parts = head.table[:valid], configs.parts(len(rows), valid, dtype)
    drows = torch.empty(rows.shape if wants[0] else 0, dtype=rows.dtype, device=rows.device)
    summed_in = weight.dtype if len(parts) == 1 and factor is None else torch.float32
    sums: list[Tensor] | None = None
    for part in parts:
        upstream = (*(None if x is None else x[part] for x in given[:2]), given[2], unit)
        grad = _launch_dlogits(head, part, upstream, dtype)
        if wants[0]:
            multiply_into(drows[part], grad[:, :valid], table, factor)
        if wants[1] or wants[2]:
            found = _launch_bwd_weight(head, part, grad, dtype, wants[2], summed_in)
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    dweight, dbias = weight.new_empty(0), empty_bias(rows, bias)
    if sums is not None:
        sums = sums if factor is None else [x * factor for x in sums]
        if wants[1]:
            dweight = padded(sums[0].to(weight.dtype), weight.shape[0])
        if wants[2]:
            dbias = padded(sums[1].to(dbias.dtype), weight.shape[0])
    return drows, dweight, dbias


def empty_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """A bias's gradient where it is not wanted, or there is none."""
    return rows.new_empty(0, dtype=torch.float32 if bias is None else bias.dtype)


def _launch_dlogits(
    head: Head, part: slice, upstream: Sequence[Tensor | None], dtype: torch.dtype
) -> Tensor:
    """(n, pitch) gradient of the products of some rows; nothing counts from the vocabulary on."""
    rows, weight, bias, class_weight, targets = head.operands
    assert rows is not None
    assert targets is not None
    rows, targets = rows[part], targets[part]
    (count, width), valid = rows.shape, head.shape["VALID"]
    pitch = configs.dlogits_pitch(valid)
    grad = torch.empty(count, pitch, dtype=dtype, device=rows.device)
    config = configs.dlogits_config(width, valid, dtype, rows.device)
    programs = min(config.pop("PROGRAMS"), _launch.ceil_div(count, config["BLOCK_N"]))
    strides = [0 if x is None else x.stride(0) for x in upstream[:2]]
    _launch.launch(
        stlm_linear_logprobs_dlogits, programs, rows, weight, bias, class_weight, targets,
        *upstream, grad, count, programs, *head.options, *strides,
        PITCH=pitch, **head.shape, device=rows.device, **config,
    )  # fmt: skip
    return grad


def _launch_bwd_weight(
    head: Head, part: slice, grad: Tensor, dtype: torch.dtype, want_bias: bool, out: torch.dtype
) -> list[Tensor]:
    """(valid, D) gradient of the table, and (valid,) of the bias in fp32 where it is wanted."""
    rows, _, _, _, targets = head.operands
    assert rows is not None
    assert targets is not None
    rows, targets = rows[part], targets[part]
    (count, width), device, valid = rows.shape, rows.device, head.shape["VALID"]
    config = configs.bwd_weight_config(width, valid, dtype, device)
    d_tiles = _launch.ceil_div(width, config["BLOCK_W"])
    splits, run = _launch.splits(count, d_tiles, config.pop("PROGRAMS"), config["BLOCK_N"])
    partial = torch.empty(splits, valid, width, dtype=torch.float32, device=device)
    bias = torch.empty(splits, valid, dtype=torch.float32, device=device) if want_bias else None
    _launch.launch(
        stlm_linear_logprobs_bwd_weight, splits * d_tiles, rows, grad, targets, partial, bias,
        count, run, head.ignore_index,
        PITCH=grad.shape[1], **head.shape, device=device, **config,
    )  # fmt: skip
    sums = [sum_splits(partial, out)]
    return sums if bias is None else [*sums, sum_splits(bias, torch.float32)]


def multiply_into(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """out = (a @ b) * factor, summed in fp32 and cast once."""
    with torch.autocast(out.device.type, enabled=False):
        if factor is None:
            multiply(a, b, out)
        else:
            product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            multiply(a, b, product)
            torch.mul(product, factor, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, with fp32 from 16 bits, which no CPU multiplies into it."""
    if a.dtype != out.dtype and a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def padded(grad: Tensor, vocab: int) -> Tensor:
    """Rows that no logit came from have no gradient."""
    missing = vocab - grad.shape[0]
    return grad if missing == 0 else torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])


def largest_upstream(dloss: Tensor, dlse: Tensor | None, divisor: Tensor | None = None) -> Tensor:
    """(1,) fp32 magnitude that upstream gradients are divided by; 1 for zero or infinity."""
    if dloss.shape[0] == 0:
        return dloss.new_ones(1)
    distinct = dloss[:1] if dloss.stride(0) == 0 else dloss
    unit = distinct.abs().amax()
    if divisor is not None:
        unit = unit / divisor
    if dlse is not None:
        unit = torch.maximum(unit, dlse.abs().amax())
    # Infinite: perhaps an ignored row's, which must not reach the others.
    return torch.where((unit > 0) & (unit < torch.inf), unit, 1.0).view(1)
