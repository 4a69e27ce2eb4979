"""`@triton.jit` helpers that two ops or more share. Importing this imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch

SUM_BLOCK = 1024


@triton.jit
def segment_bounds(cu_ptr, segment, mask, total):
    """First and one-past-last position of each segment, safe for any offsets.

    Offsets are clamped to [0, total] and a negative length is empty, so that nothing a caller
    hands over on a GPU, where values are not checked, can address memory out of bounds.
    """
    start = tl.load(cu_ptr + segment, mask=mask, other=0).to(tl.int64)
    end = tl.load(cu_ptr + segment + 1, mask=mask, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    end = tl.minimum(tl.maximum(end, start), total)
    return start, end


@triton.jit(do_not_specialize=["splits", "size"])
def stlm_sum_splits(partial_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(
    partial: Tensor,  # (splits, ...) fp32, contiguous
    dtype: torch.dtype,
) -> Tensor:
    """Add up the partial results of a split reduction, in order, and round once."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    _launch.launch(
        stlm_sum_splits, -(-out.numel() // SUM_BLOCK),
        partial, out, partial.shape[0], out.numel(),
        BLOCK=SUM_BLOCK, num_warps=4, device=partial.device,
    )  # fmt: skip
    return out
