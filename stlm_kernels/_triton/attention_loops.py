"""`@triton.jit` loops of the attention kernels: all that a tile meets of the other side, and the
isolation of what is not finite. Importing this imports triton.

A tile meets rows 0 to `high` of the other side, counted as `sight` does: each row of the tile those
from `first` to before `last`, all of them those from `all_first` to before `all_last`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import clean, load_live_rows, products, scaled, summed, zeros


@triton.jit
def _met(inner, start, first, last):
    """(rows of a tile, inner) mask of the block from `start` on."""
    inner = start + inner[None, :]
    return (inner >= first[:, None]) & (inner < last[:, None])


@triton.jit
def _masked(s, inner, start, first, last, all_first, all_last, ROWS: tl.constexpr):
    """Scores of the ROWS rows from `start` on, -inf where they are not met."""
    if start < all_first:
        s = tl.where(inner[None, :] >= (first - start)[:, None], s, float("-inf"))
    if start + ROWS > all_last:
        s = tl.where(inner[None, :] < (last - start)[:, None], s, float("-inf"))
    return s


@triton.jit
def _isolated(x, start, all_first, all_last, ROWS: tl.constexpr):
    """Rows zeroed if they are not finite and not met by all, and NaN for each of them."""
    zeroed, poison = clean(x)
    solid = (start >= all_first) & (start + ROWS <= all_last)
    poison = tl.where(solid, 0.0, poison)
    if len(x) == 1:
        return (tl.where(solid, x[0], zeroed[0]),), poison
    else:
        return (tl.where(solid, x[0], zeroed[0]), tl.where(solid, x[1], zeroed[1])), poison


@triton.jit
def softmax(
    q, k_ptr, v_ptr, k_stride, v_stride, scale, lowest, first, last, high, all_first, all_last,
    DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """Largest product, sum and weighted values of every row, over all keys that any row meets."""
    top = tl.zeros((BLOCK,), tl.float32) + lowest
    norm, acc = tl.zeros((BLOCK,), tl.float32), zeros(BLOCK, MAIN, REST)
    keys = tl.arange(0, INNER)
    k_at, v_at = keys.to(tl.int64) * k_stride, keys.to(tl.int64) * v_stride
    STAGES: tl.constexpr = 1 if ISOLATE else None
    for start in tl.range(0, high, INNER, num_stages=STAGES):
        k = load_live_rows(k_ptr, k_at, keys < high - start, DOT, MAIN, REST)
        v = load_live_rows(v_ptr, v_at, keys < high - start, DOT, MAIN, REST)
        k_ptr += INNER * k_stride.to(tl.int64)
        v_ptr += INNER * v_stride.to(tl.int64)
        s = products(q, k)
        if ISOLATE:
            v, poison = _isolated(v, start, all_first, all_last, INNER)
            s += poison[None, :]
        s = _masked(s, keys, start, first, last, all_first, all_last, INNER)
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = new_top * scale
        p = tl.exp2(s * scale - pivot[:, None])
        shrink = tl.exp2(top * scale - pivot)
        norm = norm * shrink + tl.sum(p, 1)
        acc = summed(p, v, scaled(acc, shrink))
        top = new_top
    return top, norm, acc


@triton.jit
def exact_delta(
    q, grad, k_ptr, v_ptr, k_stride, v_stride, scale, lse, first, last, high,
    DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Sum of dP over the weights of every row, from products of the operands alone."""
    delta = tl.zeros((BLOCK,), tl.float32)
    keys = tl.arange(0, INNER)
    k_at, v_at = keys.to(tl.int64) * k_stride, keys.to(tl.int64) * v_stride
    for start in range(0, high, INNER):
        k = load_live_rows(k_ptr, k_at, keys < high - start, DOT, MAIN, REST)
        v = load_live_rows(v_ptr, v_at, keys < high - start, DOT, MAIN, REST)
        k_ptr += INNER * k_stride.to(tl.int64)
        v_ptr += INNER * v_stride.to(tl.int64)
        p = tl.exp2(products(q, k) * scale - lse[:, None])
        delta += tl.sum(tl.where(_met(keys, start, first, last), p * products(grad, v), 0.0), 1)
    return delta


@triton.jit
def query_gradient(
    q, grad, k_ptr, v_ptr, k_stride, v_stride, scale, lse, delta, first, last, high, all_first,
    all_last, DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """dS K of every row, over all keys that any row meets."""
    dq = zeros(BLOCK, MAIN, REST)
    STAGES: tl.constexpr = 1 if ISOLATE else None
    keys = tl.arange(0, INNER)
    k_at, v_at = keys.to(tl.int64) * k_stride, keys.to(tl.int64) * v_stride
    for start in tl.range(0, high, INNER, num_stages=STAGES):
        k = load_live_rows(k_ptr, k_at, keys < high - start, DOT, MAIN, REST)
        v = load_live_rows(v_ptr, v_at, keys < high - start, DOT, MAIN, REST)
        k_ptr += INNER * k_stride.to(tl.int64)
        v_ptr += INNER * v_stride.to(tl.int64)
        s, dp = products(q, k), products(grad, v)
        if ISOLATE:
            k, poison = _isolated(k, start, all_first, all_last, INNER)
            s += poison[None, :]
        s = _masked(s, keys, start, first, last, all_first, all_last, INNER)
        ds = tl.exp2(s * scale - lse[:, None]) * (dp - delta[:, None])
        if ISOLATE:  # what is masked may be NaN in dp
            ds = tl.where(_met(keys, start, first, last), ds, 0.0)
        dq = summed(ds, k, dq)
    return dq


@triton.jit
def key_gradients(
    k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, width, total, scale, first, last, high,
    all_first, all_last, GROUP: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    ISOLATE: tl.constexpr,
):  # fmt: skip
    """dS^T Q and P^T dO of every key, over all rows of each head that any of the keys meets."""
    STAGES: tl.constexpr = 1 if ISOLATE else None
    ROWS: tl.constexpr = INNER // PACK
    dk, dv = zeros(BLOCK, MAIN, REST), zeros(BLOCK, MAIN, REST)
    rows, heads = tl.arange(0, INNER) % ROWS, tl.arange(0, INNER) // ROWS
    for part in range(0, GROUP, PACK):
        column = (part + heads) * (MAIN + REST)
        q_at, grad_at = rows.to(tl.int64) * q_stride + column, rows * width + column
        noted = (part + heads).to(tl.int64) * total + rows
        q_far, grad_far = q_ptr, grad_ptr
        for start in tl.range(0, high, ROWS, num_stages=STAGES):
            live = rows < high - start
            q = load_live_rows(q_far, q_at, live, DOT, MAIN, REST)
            grad = load_live_rows(grad_far, grad_at, live, DOT, MAIN, REST)
            lse = tl.load(lse_ptr + start + noted, mask=live, other=0.0)
            delta = tl.load(delta_ptr + start + noted, mask=live, other=0.0)
            q_far += ROWS * q_stride.to(tl.int64)
            grad_far += ROWS * width
            s, dp = products(k, q), products(v, grad)
            if ISOLATE:
                q, poison = _isolated(q, start, all_first, all_last, ROWS)
                grad, more = _isolated(grad, start, all_first, all_last, ROWS)
                s += (poison + more)[None, :]
            s = _masked(s, rows, start, first, last, all_first, all_last, ROWS)
            p = tl.exp2(s * scale - lse[None, :])
            ds = p * (dp - delta[None, :])
            if ISOLATE:
                met = _met(rows, start, first, last)
                p, ds = tl.where(met, p, 0.0), tl.where(met, ds, 0.0)
            dv = summed(p, grad, dv)
            dk = summed(ds, q, dk)
    return dk, dv
