"""`@triton.jit` helpers for rows of one head: a tuple of one tile, or of two where the width is no
power of two (48 is 32 + 16). Importing this imports triton.

`at` is where each row begins, in elements from the pointer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import harmless


@triton.jit
def load_live_rows(x_ptr, at, live, DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows as a product's operand, in one or two parts; zeros for those that are not live."""
    live = live[:, None]
    x = tl.load(x_ptr + at[:, None] + tl.arange(0, MAIN)[None, :], mask=live, other=0.0).to(DOT)
    if REST == 0:
        return (x,)
    else:
        place = x_ptr + at[:, None] + MAIN + tl.arange(0, REST)[None, :]
        return (x, tl.load(place, mask=live, other=0.0).to(DOT))


@triton.jit
def store_rows(x_ptr, x, at, own, MAIN: tl.constexpr, REST: tl.constexpr):
    """Store `own` rows."""
    place = x_ptr + at[:, None] + tl.arange(0, MAIN)[None, :]
    tl.store(place, x[0].to(x_ptr.dtype.element_ty), mask=own[:, None])
    if REST > 0:
        place = x_ptr + at[:, None] + MAIN + tl.arange(0, REST)[None, :]
        tl.store(place, x[1].to(x_ptr.dtype.element_ty), mask=own[:, None])


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
def added(x, y):
    if len(x) == 1:
        return (x[0] + y[0],)
    else:
        return (x[0] + y[0], x[1] + y[1])


@triton.jit
def inner(x, y):
    """Dot products of every row of x with the row of y of the same index."""
    s = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        s += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
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
def _plus(a, b):
    return a + b


@triton.jit
def is_finite(x):
    """Return whether all numbers of a tile are finite."""
    sick = tl.reduce(x[0] * 0.0, None, _plus)
    if len(x) == 2:
        sick += tl.reduce(x[1] * 0.0, None, _plus)
    return sick == 0.0


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
