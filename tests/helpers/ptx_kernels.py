"""Kernels of no op, small enough to plant a fault in each of their instructions."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def add_rows(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x + y, a block of elements a program."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    y = tl.load(y_ptr + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, x + y, mask=inside)


@triton.jit
def exponentials(x_ptr, out_ptr, N: tl.constexpr):
    """Exponentials as CUDA's library has them, of numbers that caches keep for longer."""
    places = tl.arange(0, N)
    x = tl.load(x_ptr + places, eviction_policy="evict_last")
    tl.store(out_ptr + places, libdevice.exp(x), eviction_policy="evict_first")


@triton.jit
def row_sums(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Sum of each row by all warps of a program: partial sums meet in shared memory."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + places, mask=places < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, 0))


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out (M, N) = a (M, depth) @ b (depth, N), a block of the depth at a time."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for begin in range(0, depth, K):
        a = tl.load(a_ptr + rows[:, None] * depth + begin + inner[None, :])
        b = tl.load(b_ptr + (begin + inner)[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def multiply_sums(a_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr):
    """out (M, M) = (a + a) @ a^T of a (M, K): what threads have computed is an operand."""
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    product = tl.dot(a, tl.trans(a + a))
    tl.store(out_ptr + rows[None, :] * M + rows[:, None], product)


@triton.jit
def count_down(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Programs that loop a different number of times each; lanes count as long as they may."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x_ptr + places, mask=places < n, other=0)
    steps = tl.zeros((BLOCK,), tl.int32)
    while tl.max(left, 0) > 0:
        steps += (left > 0).to(tl.int32)
        left -= 1
    tl.store(out_ptr + places, steps, mask=places < n)


@triton.jit
def add_to_bins(ids_ptr, bins_ptr, n, BLOCK: tl.constexpr):
    """Counts of ids, by atomics (which none of the library's kernels uses)."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + places, mask=places < n, other=0)
    tl.atomic_add(bins_ptr + ids, tl.full((BLOCK,), 1, tl.int32), mask=places < n)


@triton.jit
def histogram(ids_ptr, out_ptr, N: tl.constexpr, BINS: tl.constexpr):
    """Counts of ids, which triton makes by atomics on shared memory."""
    ids = tl.load(ids_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, BINS), tl.histogram(ids, BINS))


@triton.jit
def sort_rows(x_ptr, out_ptr, N: tl.constexpr):
    """Each row in ascending order."""
    places = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + places, tl.sort(tl.load(x_ptr + places)))


@triton.jit
def multiply_batches(a_ptr, b_ptr, out_ptr, B: tl.constexpr, N: tl.constexpr):
    """out = a @ b of (B, N, N)."""
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    places = tl.arange(0, B)[:, None, None] * N * N + square[None]
    tl.store(out_ptr + places, tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places)))


@triton.jit
def sines(x_ptr, out_ptr, N: tl.constexpr):
    """Sines and cosines; large angles are reduced with an array in local memory."""
    places = tl.arange(0, N)
    x = tl.load(x_ptr + places)
    tl.store(out_ptr + places, tl.sin(x))
    tl.store(out_ptr + N + places, tl.cos(x))


@triton.jit
def normals(bits_ptr, out_ptr, seed, N: tl.constexpr):
    """Random normal numbers, and the two words of bits that each is made of."""
    places = tl.arange(0, N)
    first, second, _, _ = tl.randint4x(seed, places)
    tl.store(bits_ptr + places, first.to(tl.int32, bitcast=True))
    tl.store(bits_ptr + N + places, second.to(tl.int32, bitcast=True))
    tl.store(out_ptr + places, tl.randn(seed, places))


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr
):
    """out (M, N) = a (M, K) @ b (K, N) with sums of a dtype."""
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + rows * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.dot(a, b, out_dtype=SUMS))
