"""`@triton.jit` helpers for rows of one head: a tuple of one tile, or of two where the width is no
power of two (48 is 32 + 16). Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import harmless, put, tile


@triton.jit
def load_head(x_ptr, rows, live, stride, column, DOT: tl.constexpr, MAIN: tl.constexpr,
          REST: tl.constexpr):  # fmt: skip
    """One head of some rows, in one or two parts."""
    x = tile(x_ptr, rows, live, stride, column, MAIN, DOT, MAIN)
    if REST == 0:
        return (x,)
    else:
        return (x, tile(x_ptr, rows, live, stride, column + MAIN, REST, DOT, REST))


@triton.jit
def store_head(
    x_ptr, x, rows, live, total, stride, column, MAIN: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """Zeros for rows of no document, whatever came out of them."""
    put(x_ptr, tl.where(live[:, None], x[0], 0.0), rows, rows < total, stride, column, MAIN, MAIN)
    if REST > 0:
        rest = tl.where(live[:, None], x[1], 0.0)
        put(x_ptr, rest, rows, rows < total, stride, column + MAIN, REST, REST)


@triton.jit
def zeros(BLOCK: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if REST == 0:
        return (tl.zeros((BLOCK, MAIN), tl.float32),)
    else:
        return (tl.zeros((BLOCK, MAIN), tl.float32), tl.zeros((BLOCK, REST), tl.float32))


@triton.jit
def scaled(x, factor):
    """Rows of every part times a factor each."""
    if len(x) == 1:
        return (x[0] * factor[:, None],)
    else:
        return (x[0] * factor[:, None], x[1] * factor[:, None])


@triton.jit
def difference(x, y):
    if len(x) == 1:
        return (x[0] - y[0],)
    else:
        return (x[0] - y[0], x[1] - y[1])


@triton.jit
def inner(x, y):
    """Dot products of every row of x with the row of y of the same index."""
    s = tl.sum(x[0].to(tl.float32) * y[0], 1)
    if len(x) == 2:
        s += tl.sum(x[1].to(tl.float32) * y[1], 1)
    return s


@triton.jit
def clean(x):
    if len(x) == 1:
        a, poison = harmless(x[0])
        return (a,), poison
    else:
        a, poison = harmless(x[0])
        b, more = harmless(x[1])
        return (a, b), poison + more


@triton.jit
def products(a, b):
    """Products of every row of a with every row of b: S, S^T, dP and dP^T are all formed here."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
def summed(weights, x, acc):
    """acc + weights x."""
    weights = weights.to(x[0].dtype)
    if len(x) == 1:
        return (tl.dot(weights, x[0], acc[0], input_precision="ieee"),)
    else:
        return (
            tl.dot(weights, x[0], acc[0], input_precision="ieee"),
            tl.dot(weights, x[1], acc[1], input_precision="ieee"),
        )
