"""A kernel that takes as long as it is told, to check a timer against."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _spin(out_ptr, nanoseconds):
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    tl.store(out_ptr, now - begin)


def spin(out: Tensor, nanoseconds: int) -> None:
    """Occupy the device until its clock has moved on; writes into out (1,) int64 by how much."""
    _spin[(1,)](out, nanoseconds, num_warps=1)
