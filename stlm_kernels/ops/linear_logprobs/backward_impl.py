"""Both gradients of a sum or mean of row losses in one kernel, where it fits.

That is without bias, class weights, cap and z-loss, with D up to 128 and 129 to 272 columns in 16
bits, on sm_90; `dlogits_impl` does all else. A program walks a run of rows with the table E in
shared memory and its dE in registers. It forms z^T = E H^T once, and of it the gradient G^T in
[-1, 1], an operand of dE = G^T H in registers and of dH^T = E^T G^T through shared memory; upstream
gradient and scale multiply the fp32 sums. The runs' partial sums are added in a fixed order. No
accumulator is ever transposed (Triton up to 3.7.0 miscompiles that on Hopper).

Floor, N = 65,536, D = 128, V = 256: three products of 4.3 GFLOP = 16.3 us at 790 TFLOP/s, 34.5 MB =
8 us at 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.row_losses import IGNORED, LOG2E, hidden_tile, table_tile
from ..._triton.tiles import sum_splits
from . import config as configs
from .dlogits_impl import empty_bias, padded, through_dlogits
from .triton_impl import Head, head_and_wants


@triton.jit
def _gradient_of_columns(
    table, h, columns, codes, top, log_total, scale, smoothing, VALID: tl.constexpr
):  # fmt: skip
    """(columns, rows) gradient of the logits of a plain sum of losses."""
    z = tl.dot(table, tl.trans(h))
    if scale is not None:
        z *= scale
    grad = tl.exp2((z - top[None, :]) * LOG2E - log_total[None, :])
    hard = 1.0
    if smoothing is not None:
        grad -= smoothing / VALID
        hard = 1.0 - smoothing
    grad = tl.where(columns[:, None] == codes[None, :], grad - hard, grad)
    return tl.where((columns < VALID)[:, None], grad, 0.0).to(h.dtype)


@triton.jit(do_not_specialize=["n_rows", "run"])
def stlm_linear_logprobs_bwd(
    h_ptr, w_ptr, codes_ptr, top_ptr, log_total_ptr, dloss_ptr, divisor_ptr, dh_ptr, dw_ptr,
    n_rows, run, scale, smoothing,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Halves of the main block one after the other: fewer logits are in registers at a time."""
    HALF: tl.constexpr = MAIN // 2
    program, local, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    low, high = tl.arange(0, HALF), HALF + tl.arange(0, HALF)
    low_table = table_tile(w_ptr, low, d, D, VALID, DOT)
    high_table = table_tile(w_ptr, high, d, D, VALID, DOT)
    dlow, dhigh = tl.zeros((HALF, BLOCK_D), tl.float32), tl.zeros((HALF, BLOCK_D), tl.float32)
    if TAIL > 0:
        tail = MAIN + tl.arange(0, TAIL)
        tail_table = table_tile(w_ptr, tail, d, D, VALID, DOT)
        dtail = tl.zeros((TAIL, BLOCK_D), tl.float32)
    factor = tl.load(dloss_ptr)
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
        # A mean over no row is NaN, and its gradient 0.
        factor = tl.where(divisor != 0, factor / divisor, 0.0)
    if scale is not None:
        factor *= scale
    for first in range(program * run, tl.minimum((program + 1) * run, n_rows), BLOCK_N):
        inside = local < n_rows - first
        codes = tl.load(codes_ptr + first + local, mask=inside, other=IGNORED)
        top = tl.load(top_ptr + first + local, mask=inside, other=0.0)
        log_total = tl.load(log_total_ptr + first + local, mask=inside, other=float("inf"))
        live = codes != IGNORED
        h = hidden_tile(h_ptr, first, local, live, d, D, DOT)
        if TAIL > 0:
            rest = _gradient_of_columns(
                tail_table, h, tail, codes, top, log_total, scale, smoothing, VALID
            )
            dtail = tl.dot(rest, h, dtail)
        grad = _gradient_of_columns(
            low_table, h, low, codes, top, log_total, scale, smoothing, VALID
        )
        dlow = tl.dot(grad, h, dlow)
        dh = tl.dot(tl.trans(low_table), grad)
        grad = _gradient_of_columns(
            high_table, h, high, codes, top, log_total, scale, smoothing, VALID
        )
        dhigh = tl.dot(grad, h, dhigh)
        dh = tl.dot(tl.trans(high_table), grad, dh)
        if TAIL > 0:
            dh = tl.dot(tl.trans(tail_table), rest, dh)
        dh = (dh * tl.where(live, factor, 0.0)[None, :]).to(dh_ptr.dtype.element_ty)
        place = dh_ptr + first * D + (local[None, :] * D + d[:, None])
        tl.store(place, dh, mask=(d < D)[:, None] & inside[None, :])
    place, inside = dw_ptr + program * VALID * D + d[None, :], (d < D)[None, :]
    tl.store(place + low[:, None] * D, dlow * factor, mask=inside)
    tl.store(place + high[:, None] * D, dhigh * factor, mask=inside & (high < VALID)[:, None])
    if TAIL > 0:
        tl.store(place + tail[:, None] * D, dtail * factor, mask=inside & (tail < VALID)[:, None])


def launch_sum_bwd(
    dloss: Tensor,  # 0-d
    dlse: Tensor | None,  # (N,) of any stride
    divisor: Tensor | None,  # 0-d, of a mean
    top: Tensor | None,  # (N,) kept by the forward where `bwd` can run, and so the next two
    log_total: Tensor | None,  # (N,)
    codes: Tensor | None,  # (N,)
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    dot_dtype: torch.dtype,
    *options_and_wants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a sum or mean and of each lse; what is not wanted may be empty."""
    operands = (rows, weight, targets, bias, class_weight)
    head, wants = head_and_wants(operands, dot_dtype, options_and_wants)
    plain = bias is class_weight is dlse is head.cap is head.z_loss is None
    if plain and codes is not None:
        saved = (codes, top, log_total, dloss, divisor)
        drows, dweight = _launch_bwd(head, rows, weight, saved, dot_dtype)
        dbias = empty_bias(rows, bias)
        return (
            drows if wants[0] else rows.new_empty(0),
            dweight if wants[1] else weight.new_empty(0),
            dbias,
        )
    each = dloss.expand(rows.shape[0])
    return through_dlogits(head, operands, (each, dlse, divisor), dot_dtype, wants)


def _launch_bwd(
    head: Head, rows: Tensor, weight: Tensor, saved: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and table."""
    (count, width), device, valid = rows.shape, rows.device, head.shape["VALID"]
    config = configs.bwd_config(width, valid, dtype, device)
    splits, run = _launch.splits(count, 1, config.pop("PROGRAMS"), config["BLOCK_N"])
    drows = torch.empty((count, width), dtype=rows.dtype, device=device)
    partial = torch.empty(splits, valid, width, dtype=torch.float32, device=device)
    _launch.launch(
        stlm_linear_logprobs_bwd, splits, *head.operands[:2], *saved, drows, partial,
        count, run, head.scale, head.smoothing, **head.shape, device=device, **config,
    )  # fmt: skip
    return drows, padded(sum_splits(partial, weight.dtype), weight.shape[0])
