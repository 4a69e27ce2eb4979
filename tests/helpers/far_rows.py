"""A tile far behind in a large batch, as a program of attention sees it: only numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stlm_kernels._triton.sight import sight


@triton.jit(do_not_specialize=["tile", "length", "other", "before", "behind"])
def _sight_of(out_ptr, tile, length, other, before, behind, ROWS: tl.constexpr):
    tile += tl.program_id(0)
    base, count, there, first, last, high, all_first, all_last = sight(
        out_ptr, tile, length, other, before, behind, False, ROWS, ROWS
    )
    own = tl.arange(0, ROWS)
    tl.store(out_ptr + own, there + first)
    tl.store(out_ptr + ROWS + own, there + last)
    out_ptr += 2 * ROWS
    tl.store(out_ptr, base)
    tl.store(out_ptr + 1, count)
    tl.store(out_ptr + 2, there)
    tl.store(out_ptr + 3, there + high)
    tl.store(out_ptr + 4, there + all_first)
    tl.store(out_ptr + 5, there + all_last)


def sight_of(
    tile: int, length: int, other: int, sides: tuple[int, int], device: str
) -> tuple[list[int], list[int], list[int]]:
    """First and last that each of a tile's 16 rows meets, and base, count, and the first of any,
    the last of any, the first of all, the last of all: in the streams of both sides."""
    out: Tensor = torch.empty(2 * 16 + 6, dtype=torch.int64, device=device)
    _sight_of[(1,)](out, tile, length, other, *sides, ROWS=16)
    return out[:16].tolist(), out[16:32].tolist(), out[32:].tolist()
