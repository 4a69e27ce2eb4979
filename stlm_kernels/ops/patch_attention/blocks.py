"""`@triton.jit` helpers of the patch_attention kernels: whose patch a row is in, and one head of a
tile of rows whose patches are longer than a tile. Importing this imports triton.

These are the loops of `triton_impl` over one long patch among short ones, NaN isolation included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.tiles import harmless, put, segment_bounds, segments_from, tile


@triton.jit
def patches_of(cu_ptr, patch, first, n_patches, total, BLOCK: tl.constexpr):
    """First row of the patch of each of BLOCK rows, and one past its last, counted from `first`;
    0, 0 for rows of none. `patch`: one that starts no later."""
    rows = first + tl.arange(0, BLOCK)
    patches = segments_from(cu_ptr, patch, first, n_patches, BLOCK)
    inside = (rows < total) & (patches >= 0) & (patches < n_patches)
    start, end = segment_bounds(cu_ptr, patches, inside, total)
    inside = inside & (rows >= start) & (rows < end)
    start = tl.where(inside, start - first, 0).to(tl.int32)
    return start, tl.where(inside, end - first, 0).to(tl.int32)


@triton.jit
def seen_by(start, end, others, IS_CAUSAL: tl.constexpr, ABOVE: tl.constexpr):
    """Mask of (own rows, others), all counted from the first own row: those of the same patch, with
    IS_CAUSAL only earlier ones, or, with ABOVE, only later ones."""
    start, end, others = start[:, None], end[:, None], others[None, :]
    if IS_CAUSAL:
        own = tl.arange(0, start.shape[0])[:, None]
        if ABOVE:
            start = tl.maximum(start, own)
        else:
            end = tl.minimum(end, own + 1)
    return (others >= start) & (others < end)


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, base, start, end, owned,
    total, q_stride, k_stride, v_stride, scale, head,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK queries from `base` on, as many keys at a time; `owned`: rows to store."""
    live, rows = owned & (end > start), base + tl.arange(0, BLOCK)
    low = tl.min(tl.where(live, start, BLOCK), 0)
    high = tl.max(tl.where(live, end, 0), 0)
    if IS_CAUSAL:
        high = tl.minimum(high, BLOCK)
    q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm, acc = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(low, high, BLOCK):
        other = first + tl.arange(0, BLOCK)
        inside, keys = other < high, base + other
        k = tile(k_ptr, keys, inside, k_stride, head // GROUP * K, K, DOT, WIDTH)
        v = tile(v_ptr, keys, inside, v_stride, head // GROUP * K, K, DOT, WIDTH)
        v, poison = harmless(v)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") + poison[None, :]
        s = tl.where(seen_by(start, end, other, IS_CAUSAL, False), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * scale  # it saw nothing yet
        p = tl.exp2(s * scale - pivot[:, None])
        shrink = tl.exp2(top * scale - pivot)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    norm = tl.where(live, norm, 1.0)
    lse = tl.where(live, top * scale + tl.log2(norm), 0.0)
    tl.store(lse_ptr + total * head + rows, lse, mask=owned)
    acc *= (1.0 / norm)[:, None]
    put(out_ptr, acc, rows, owned, H * K, head * K, K, WIDTH)


@triton.jit
def of_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, base, start, end, owned,
    total, q_stride, k_stride, v_stride, scale, unit, head,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq of one head of BLOCK queries, without the error that a 16-bit `out` makes in rowsum(dO *
    out): as a row of dS adds up to zero, what it does add up to is that error."""
    NARROW: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    live, rows = owned & (end > start), base + tl.arange(0, BLOCK)
    low = tl.min(tl.where(live, start, BLOCK), 0)
    high = tl.max(tl.where(live, end, 0), 0)
    if IS_CAUSAL:
        high = tl.minimum(high, BLOCK)
    q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
    grad = tile(grad_ptr, rows, live, H * K, head * K, K, DOT, WIDTH)
    out = tile(out_ptr, rows, live, H * K, head * K, K, tl.float32, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out, 1)
    lse = tl.load(lse_ptr + total * head + rows, mask=live, other=0.0)
    dq, mean = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    for first in range(low, high, BLOCK):
        other = first + tl.arange(0, BLOCK)
        inside, keys = other < high, base + other
        k = tile(k_ptr, keys, inside, k_stride, head // GROUP * K, K, DOT, WIDTH)
        v = tile(v_ptr, keys, inside, v_stride, head // GROUP * K, K, DOT, WIDTH)
        seen = seen_by(start, end, other, IS_CAUSAL, False)
        k, poison = harmless(k)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + poison[None, :]
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = tl.where(seen, p * (dp - delta[:, None]), 0.0)
        dq = tl.dot(ds.to(DOT), k, dq, input_precision="ieee")
        if NARROW:
            excess += tl.sum(ds, 1)
            mean = tl.dot(p.to(DOT), k, mean, input_precision="ieee")
    if NARROW:
        dq -= excess[:, None] * mean
    dq = tl.where(live[:, None], dq, 0.0)
    put(dq_ptr, dq * unit, rows, owned, H * K, head * K, K, WIDTH)


@triton.jit
def of_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dk_ptr, dv_ptr,
    base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit, kv_head,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of one head of BLOCK keys. In a patch of more rows than a tile `out` is so small
    that rowsum(dO * out) needs no correction."""
    KV: tl.constexpr = H // GROUP
    live, keys = owned & (end > start), base + tl.arange(0, BLOCK)
    low = tl.min(tl.where(live, start, BLOCK), 0)
    high = tl.max(tl.where(live, end, 0), 0)
    if IS_CAUSAL:
        low = tl.maximum(low, 0)
    k = tile(k_ptr, keys, live, k_stride, kv_head * K, K, DOT, WIDTH)
    v = tile(v_ptr, keys, live, v_stride, kv_head * K, K, DOT, WIDTH)
    dk, dv = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for first in range(low, high, BLOCK):
            other = first + tl.arange(0, BLOCK)
            inside, rows = other < high, base + other
            q = tile(q_ptr, rows, inside, q_stride, head * K, K, DOT, WIDTH)
            grad = tile(grad_ptr, rows, inside, H * K, head * K, K, DOT, WIDTH)
            out = tile(out_ptr, rows, inside, H * K, head * K, K, tl.float32, WIDTH)
            delta = tl.sum(grad.to(tl.float32) * out, 1)
            q, poison = harmless(q)
            grad, more = harmless(grad)
            lse = tl.load(lse_ptr + total * head + rows, mask=inside, other=0.0)
            seen = seen_by(start, end, other, IS_CAUSAL, True)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(seen, tl.exp2(s + (poison + more - lse)[None, :]), 0.0)
            dv = tl.dot(p.to(DOT), grad, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
            ds = tl.where(seen, p * (dp - delta[None, :]), 0.0)
            dk = tl.dot(ds.to(DOT), q, dk, input_precision="ieee")
    dk, dv = tl.where(live[:, None], dk, 0.0), tl.where(live[:, None], dv, 0.0)
    put(dk_ptr, dk * unit, keys, owned, KV * K, kv_head * K, K, WIDTH)
    put(dv_ptr, dv, keys, owned, KV * K, kv_head * K, K, WIDTH)
