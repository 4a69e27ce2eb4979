"""Kernels that newer compilers must get right and ours must never resemble."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def transposed_square(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    """out (N, N) = (a b^T)^T c of (N, N) operands, in one block."""
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + square), tl.trans(tl.load(b_ptr + square)))
    turned = tl.trans(product).to(c_ptr.dtype.element_ty)
    tl.store(out_ptr + square, tl.dot(turned, tl.load(c_ptr + square)))


@triton.jit
def transposed_sums(a_ptr, b_ptr, c_ptr, out_ptr, depth, N: tl.constexpr, BLOCK: tl.constexpr):
    """out (N, N) = (a b^T)^T c of a, b (N, depth) and c (N, N), summed over blocks of the depth."""
    rows, inner = tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((N, N), tl.float32)
    for begin in range(0, depth, BLOCK):
        places = rows[:, None] * depth + begin + inner[None, :]
        total += tl.dot(tl.load(a_ptr + places), tl.trans(tl.load(b_ptr + places)))
    square = rows[:, None] * N + rows[None, :]
    turned = tl.trans(total.to(c_ptr.dtype.element_ty))
    tl.store(out_ptr + square, tl.dot(turned, tl.load(c_ptr + square)))


def transposed_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """(a b^T)^T c of (N, N) operands, the transposition made of the accumulator."""
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    transposed_square[(1,)](a, b, c, out, N=a.shape[0], num_warps=4)
    return out
