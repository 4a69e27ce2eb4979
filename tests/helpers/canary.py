"""A kernel that newer compilers must get right and ours must never resemble."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _transposed_product(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + square), tl.trans(tl.load(b_ptr + square)))
    turned = tl.trans(product).to(c_ptr.dtype.element_ty)
    tl.store(out_ptr + square, tl.dot(turned, tl.load(c_ptr + square)))


def transposed_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """(a b^T)^T c of (N, N) operands, the transposition made of the accumulator."""
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    _transposed_product[(1,)](a, b, c, out, N=a.shape[0], num_warps=4)
    return out
