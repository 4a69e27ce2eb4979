"""`@triton.jit` helpers for losses of rows: logits with the rows down, their statistics, and their
gradient. Importing this imports triton.

Options that are not used are None, which triton compiles for: they cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import LOG2_E, capped

LEAST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2E = tl.constexpr(LOG2_E)
LN2 = tl.constexpr(1 / LOG2_E)
IGNORED, BAD = tl.constexpr(-1), tl.constexpr(2**30)
"""Codes of rows that do not count, and of those whose target names no column."""


@triton.jit
def row_codes(target_ptr, first, local, inside, ignore_index, VALID: tl.constexpr):
    """Target of each row in 32 bits, IGNORED or BAD."""
    raw = tl.load(target_ptr + first + local, mask=inside, other=0).to(tl.int64)
    return code_of(raw, inside, ignore_index, VALID)


@triton.jit
def code_of(raw, inside, ignore_index, VALID: tl.constexpr):
    codes = tl.where((raw >= 0) & (raw < VALID), raw, BAD)
    return tl.where(inside & (raw != ignore_index), codes, IGNORED).to(tl.int32)


@triton.jit
def table_tile(w_ptr, columns, d, D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr):
    """(columns, d) of the table as an operand of products; zeros where there is none."""
    mask = (columns < VALID)[:, None] & (d < D)[None, :]
    return tl.load(w_ptr + (columns[:, None] * D + d[None, :]), mask=mask, other=0.0).to(DOT)


@triton.jit
def hidden_tile(h_ptr, first, local, live, d, D: tl.constexpr, DOT: tl.constexpr):
    """(rows, d) of the hidden states likewise."""
    mask = live[:, None] & (d < D)[None, :]
    place = h_ptr + first * D + (local[:, None] * D + d[None, :])
    return tl.load(place, mask=mask, other=0.0).to(DOT)


@triton.jit
def finished(z, bias, columns, scale, cap, VALID: tl.constexpr, WHOLE: tl.constexpr):
    """Products with bias, scale and cap; `columns`, each product's, may lack dimensions.

    Columns that do not exist are -inf, unless the block is whole.
    """
    if bias is not None:
        z += bias
    if scale is not None:
        z *= scale
    if cap is not None:
        z = capped(z, cap)
    if not WHOLE:
        z = tl.where(columns < VALID, z, float("-inf"))
    return z


@triton.jit
def finished_rows(z, bias_ptr, columns, scale, cap, VALID: tl.constexpr, WHOLE: tl.constexpr):
    """`finished` for (rows, columns) products."""
    bias = None
    if bias_ptr is not None:
        # A vector, not a row of a tile: that would bring the products into the load's layout.
        bias = tl.load(bias_ptr + columns, mask=columns < VALID, other=0.0).to(tl.float32)[None, :]
    return finished(z, bias, columns[None, :], scale, cap, VALID, WHOLE)


@triton.jit
def target_weights(class_ptr, codes, smoothing):
    """Factors of the log-probability of each row's target; 0 where a row does not count."""
    hard = (codes >= 0).to(tl.float32)
    if class_ptr is not None:
        named = (codes != IGNORED) & (codes != BAD)
        hard = tl.load(class_ptr + codes, mask=named, other=0.0).to(tl.float32)
    if smoothing is not None:
        hard *= 1.0 - smoothing
    return hard


@triton.jit
def column_weights(class_ptr, columns, smoothing, VALID: tl.constexpr):
    """Factors of the log-probabilities of columns in every row; 0 where none exists."""
    weights = (columns < VALID).to(tl.float32)
    if class_ptr is not None:
        weights = tl.load(class_ptr + columns, mask=columns < VALID, other=0.0).to(tl.float32)
    # Without smoothing the weights of other columns may be infinite.
    return weights * (smoothing / VALID)


@triton.jit
def tables(
    w_ptr, D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The table's columns in both blocks where BLOCK_D spans D, to stay on the chip."""
    main, tail = w_ptr, w_ptr
    if BLOCK_D >= D:
        d = tl.arange(0, BLOCK_D)
        main = table_tile(w_ptr, tl.arange(0, MAIN), d, D, VALID, DOT)
        if TAIL > 0:
            tail = table_tile(w_ptr, MAIN + tl.arange(0, TAIL), d, D, VALID, DOT)
    return main, tail


@triton.jit
def smoothing_weights(
    class_ptr, smoothing, VALID: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """`column_weights` of both blocks and their sum; zeros where nothing is smoothed."""
    # Triton 3.6 returns no None in a tuple.
    soft, rest, total = 0.0, 0.0, 0.0
    if smoothing is not None:
        soft = column_weights(class_ptr, tl.arange(0, MAIN), smoothing, VALID)
        total = tl.sum(soft, 0)
        if TAIL > 0:
            rest = column_weights(class_ptr, MAIN + tl.arange(0, TAIL), smoothing, VALID)
            total += tl.sum(rest, 0)
        if class_ptr is None:
            total = smoothing
    return soft, rest, total


@triton.jit
def products(
    h_ptr, w_ptr, table, rest, first, local, live,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of a block of rows with both blocks of columns; `tables` where BLOCK_D spans D."""
    d = tl.arange(0, BLOCK_D)
    if BLOCK_D >= D:
        h = hidden_tile(h_ptr, first, local, live, d, D, DOT)
        z = tl.dot(h, tl.trans(table), input_precision="ieee")
        y = z
        if TAIL > 0:
            y = tl.dot(h, tl.trans(rest), input_precision="ieee")
    else:
        z = tl.zeros((local.shape[0], MAIN), tl.float32)
        y = tl.zeros((local.shape[0], TAIL if TAIL > 0 else 1), tl.float32)
        for start in range(0, D, BLOCK_D):
            h = hidden_tile(h_ptr, first, local, live, start + d, D, DOT)
            if TAIL > 0:
                w = table_tile(w_ptr, MAIN + tl.arange(0, TAIL), start + d, D, VALID, DOT)
                y = tl.dot(h, tl.trans(w), y, input_precision="ieee")
            w = table_tile(w_ptr, tl.arange(0, MAIN), start + d, D, VALID, DOT)
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z, y


@triton.jit
def both_logits(
    h_ptr, w_ptr, bias_ptr, table, rest, first, local, live, scale, cap,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of a block of rows in both blocks of columns, and the largest of each row."""
    z, y = products(
        h_ptr, w_ptr, table, rest, first, local, live, D, VALID, DOT, MAIN, TAIL, BLOCK_D
    )
    z = finished_rows(z, bias_ptr, tl.arange(0, MAIN), scale, cap, VALID, MAIN <= VALID)
    top = tl.max(z, 1)
    if TAIL > 0:
        y = finished_rows(y, bias_ptr, MAIN + tl.arange(0, TAIL), scale, cap, VALID, False)
        top = tl.maximum(top, tl.max(y, 1))
    return z, y, tl.maximum(top, LEAST)  # a bias of -inf may rule out all columns


@triton.jit
def powers(z, top):
    """Exponentials of what lies below the largest logit."""
    return tl.exp2((z - top) * LOG2E)


@triton.jit
def sum_of_powers(z, y, top, TAIL: tl.constexpr):
    total = tl.sum(powers(z, top[:, None]), 1)
    if TAIL > 0:
        total += tl.sum(powers(y, top[:, None]), 1)
    return total


@triton.jit
def picked_logits(z, y, codes, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Logit of each row's target; 0 where it has none."""
    picked = tl.sum(tl.where(tl.arange(0, MAIN)[None, :] == codes[:, None], z, 0.0), 1)
    if TAIL > 0:
        hit = (MAIN + tl.arange(0, TAIL))[None, :] == codes[:, None]
        picked += tl.sum(tl.where(hit, y, 0.0), 1)
    return picked


@triton.jit
def weighted_sum(z, soft):
    """Sum of each row's logits by the columns' weights; logits of -inf may weigh nothing."""
    return tl.sum(tl.where((soft != 0)[None, :], z * soft[None, :], 0.0), 1)


@triton.jit
def upstream(dloss_ptr, divisor_ptr, unit_ptr, first, local, codes, stride):
    """Upstream gradient of each row's loss (1 if the pointer is None), over the unit."""
    live = codes != IGNORED
    dloss = live.to(tl.float32)
    if dloss_ptr is not None:
        dloss = tl.load(dloss_ptr + (first + local) * stride, mask=live, other=0.0)
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
        # A mean over no row is NaN, and its gradient 0.
        dloss = tl.where(divisor != 0, dloss / divisor, 0.0)
    if unit_ptr is not None:
        dloss /= tl.load(unit_ptr)
    return tl.where(codes == BAD, float("nan"), dloss)


@triton.jit
def rates(
    dloss, dlse_ptr, unit_ptr, first, local, stride, codes, top, total, mass, z_loss
):  # fmt: skip
    """Factors of each row's `powers` in its gradient; dlse_ptr is None where no such one came."""
    rate = dloss * mass
    if z_loss is not None:
        rate += dloss * (2.0 * z_loss * (top + tl.log2(total) * LN2))
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + (first + local) * stride, mask=codes != IGNORED, other=0.0)
        if unit_ptr is not None:
            dlse /= tl.load(unit_ptr)
        rate += dlse
    return tl.where(codes == IGNORED, 0.0, rate / total)


@triton.jit
def dlogits(
    z, top, rate, dloss, hard, soft, columns, codes, scale, cap,
    VALID: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradient of the products, of whatever shape the arguments make together.

    Zero in columns that do not exist; `soft` is None where nothing is smoothed.
    """
    grad = powers(z, top) * rate
    if soft is not None:
        grad -= dloss * soft
    grad = tl.where(columns == codes, grad - dloss * hard, grad)
    if cap is not None:
        grad *= 1.0 - (z / cap) * (z / cap)
    if scale is not None:
        grad *= scale
    if not WHOLE:
        grad = tl.where(columns < VALID, grad, 0.0)
    return grad
