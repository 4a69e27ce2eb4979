"""A reduction and a scan by a function of our own, whose order shows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _later(x, place, y, other):
    """The later of two numbers that is not zero, and its place: associative, not commutative."""
    return tl.where(y != 0, y, x), tl.where(y != 0, other, place)


@triton.jit
def _combine(
    x_ptr, last_ptr, place_ptr, running_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AXIS: tl.constexpr, KEEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    last, place = tl.reduce((x, at), AXIS, _later, keep_dims=KEEPS)
    over = 0 if AXIS is None else AXIS
    running, _ = tl.associative_scan((x, at), over, _later, reverse=REVERSE)
    tl.store(running_ptr + at, running)
    if AXIS is None:
        tl.store(last_ptr + tl.zeros_like(last).to(tl.int32), last)
        tl.store(place_ptr + tl.zeros_like(last).to(tl.int32), place)
    else:
        own = tl.arange(0, ROWS * COLUMNS // (COLUMNS if AXIS == 1 else ROWS))
        if KEEPS:
            own = tl.expand_dims(own, AXIS)
        tl.store(last_ptr + own, last)
        tl.store(place_ptr + own, place)


def combined(
    x: Tensor, axis: int | None, keep_dims: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The last numbers of x that are not zero along an axis, their places in x, and all so far."""
    count = 1 if axis is None else x.shape[1 - axis]
    last, place, running = torch.empty(count), torch.empty(count).int(), torch.empty_like(x)
    _combine[(1,)](x, last, place, running, *x.shape, axis, keep_dims, reverse)
    return last, place, running
