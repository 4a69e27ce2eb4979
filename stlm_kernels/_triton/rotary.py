"""`@triton.jit` helpers for pairs of columns of heads: their norm, rotation and gradients.

A pair is two halves of a row, loaded apart, or neighbours, loaded together and split in registers,
so that either way memory is read and written in whole vectors. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import side_by_side


@triton.jit
def load_pairs(
    x_ptr, place, live, K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """First and second of each pair of rows, (rows, WIDTH / 2) as stored; zeros where none are."""
    if IS_INTERLEAVED:
        d = tl.arange(0, WIDTH)
        mask = live[:, None] & (d < K)[None, :]
        x = tl.load(x_ptr + place[:, None] + d[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(x, (place.shape[0], WIDTH // 2, 2)))
    else:
        d = side_by_side(WIDTH // 2, 4)
        mask = live[:, None] & (d < K // 2)[None, :]
        first = tl.load(x_ptr + place[:, None] + d[None, :], mask=mask, other=0.0)
        second = tl.load(x_ptr + place[:, None] + K // 2 + d[None, :], mask=mask, other=0.0)
    return first, second


@triton.jit
def store_pairs(
    x_ptr, first, second, place, live,
    K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, second = first.to(x_ptr.dtype.element_ty), second.to(x_ptr.dtype.element_ty)
    if IS_INTERLEAVED:
        d = tl.arange(0, WIDTH)
        mask = live[:, None] & (d < K)[None, :]
        x = tl.reshape(tl.join(first, second), (place.shape[0], WIDTH))
        tl.store(x_ptr + place[:, None] + d[None, :], x, mask=mask)
    else:
        d = side_by_side(WIDTH // 2, 4)
        mask = live[:, None] & (d < K // 2)[None, :]
        tl.store(x_ptr + place[:, None] + d[None, :], first, mask=mask)
        tl.store(x_ptr + place[:, None] + K // 2 + d[None, :], second, mask=mask)


@triton.jit
def pair_columns(K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first and the second of each pair in a row."""
    d = side_by_side(WIDTH // 2, 4)
    first = d * 2 if IS_INTERLEAVED else d
    return first, first + (1 if IS_INTERLEAVED else K // 2), d < K // 2


@triton.jit
def angles_of(
    cos_ptr, sin_ptr, positions_ptr, tokens, live, period, n_positions,
    K: tl.constexpr, HAS_POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH / 2) cos and sin of each row's position in fp32."""
    positions = tokens % period
    if HAS_POSITIONS:
        positions = tl.load(positions_ptr + positions, mask=live, other=0).to(tl.int64)
    good = (positions >= 0) & (positions < n_positions)
    d = side_by_side(WIDTH // 2, 4)
    mask = (live & good)[:, None] & (d < K // 2)[None, :]
    place = positions[:, None] * (K // 2) + d[None, :]
    bad = tl.where(live & ~good, float("nan"), 0.0)[:, None]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0).to(tl.float32) + bad
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32) + bad
    return cos, sin


@triton.jit
def inverse_rms(a, b, eps, K: tl.constexpr):
    """(rows,) 1 / rms of each row; 1 without a norm."""
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / K
    return tl.where(eps < 0, 1.0, tl.rsqrt(mean + tl.maximum(eps, 0.0)))


@triton.jit
def norm_weights(w_ptr, columns, exists, eps):
    """(WIDTH / 2,) fp32; ones without a norm."""
    return tl.load(w_ptr + columns, mask=exists & (eps >= 0), other=1.0).to(tl.float32)


@triton.jit
def normed_and_turned(a, b, w_a, w_b, cos, sin, eps, K: tl.constexpr):
    """Pairs after norm, weight and rotation."""
    r = inverse_rms(a, b, eps, K)[:, None]
    a, b = a * r * w_a, b * r * w_b
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def turned_back(up_a, up_b, cos, sin):
    """Upstream gradients before the rotation."""
    return up_a * cos + up_b * sin, up_b * cos - up_a * sin


@triton.jit
def norm_gradients(dy_a, dy_b, a, b, w_a, w_b, eps, K: tl.constexpr):
    """Gradients of the pairs a, b beneath norm and weight, and each row's terms of the weight's."""
    r = inverse_rms(a, b, eps, K)[:, None]
    g_a, g_b = dy_a * w_a, dy_b * w_b
    mean = (tl.sum(g_a * a, 1) + tl.sum(g_b * b, 1)) / K
    pull = tl.where(eps < 0, 0.0, mean)[:, None] * r * r
    return r * (g_a - a * pull), r * (g_b - b * pull), dy_a * a * r, dy_b * b * r
