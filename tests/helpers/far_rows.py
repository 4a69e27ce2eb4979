"""Rows counted beyond 2^31, as a program of attention sees them: no memory, only numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stlm_kernels._triton.sight import sight


@triton.jit(do_not_specialize=["base", "end", "length", "side"])
def _sight_of(out_ptr, base, end, length, side, BLOCK: tl.constexpr):
    first, last = sight(out_ptr, base, end, base, length, length, side, side, False, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), first)
    tl.store(out_ptr + BLOCK + tl.arange(0, BLOCK), last)


def sight_of(base: int, end: int, length: int, side: int, device: str) -> Tensor:
    """(2, 16) int32: first and last of rows base to base + 15, counted from base."""
    out = torch.empty((2, 16), dtype=torch.int32, device=device)
    _sight_of[(1,)](out, base, end, length, side, BLOCK=16)
    return out
