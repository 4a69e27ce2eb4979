"""patch_attention in Triton where patches are short: a tile of TILE rows holds whole patches.

Ownership. A program owns the patches of up to TILE rows that begin in its window of WINDOW rows,
the window's rows of longer patches and of none, and KV_HEADS key heads with the query heads that
share them. It finds the first patch by bisection and walks on from there, tile by tile: as many
whole patches as fit (two patches of 12 bytes in 32 rows), so that each operand is read once, the
mask is made once for all heads, and one step sees all that a row may see.
Forward. Softmax in base 2, fp32; the mask is a tensor of 0 and -inf that joins the scaled scores in
one fused operation. Backward, one kernel for all gradients: the weights formed again from the saved
log-sum-exp, delta = rowsum(P * dP), which needs no `out` and makes each row of dS add up to zero.
S^T = K Q^T and dP^T = V dO^T are formed directly, so that no accumulator is ever transposed.
Rows of longer patches loop over them, one tile at a time, as in `blocks`.

NaN and infinities: a weight of zero times NaN is NaN, and a mask that is added masks none either.
So whatever is not finite among the operands of a tile shows in its results (forward) or in dq
(backward), which are looked at once for all heads; such a tile is done anew with `ISOLATE`.

Floor (bf16, 8192 patches of 12 bytes, H = 8, 4.3 TB/s): 8 T H K bytes forward, 14 T H K backward,
as `out` is not read: 24 and 41 us at K = 16, twice that at K = 32. Counted on sm_90 at least 22
and 37 us at K = 16 (instructions 22 and 29), 43 and 74 at K = 32 (26 and 43). 262,144 bytes as
words, K = 32, backward: 192 us of the load-store pipe, DRAM 178.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.tiles import harmless, put, segment_at, segment_bounds, tile
from .blocks import attend, of_keys, of_queries, patches_of, seen_by

LOWEST = tl.constexpr(-3.0e38)
"""Instead of -inf as the largest score of a row that sees nothing: -inf minus this is no NaN."""


@triton.jit
def _first_own(cu_ptr, window, n_patches, total, TILE: tl.constexpr):
    """A patch that starts at or before a window's first row, and the first row to own."""
    patch = segment_at(cu_ptr, window, n_patches, 32)
    start, end = segment_bounds(cu_ptr, patch, (patch >= 0) & (patch < n_patches), total)
    of_another = (start < window) & (window < end) & (end - start <= TILE)
    return patch, tl.where(of_another, end, window)


@triton.jit
def _whole(start, end, left, TILE: tl.constexpr):
    """Number of a tile's leading rows that are in whole patches, or none, that begin in the `left`
    rows of the window; 0 where the first is in a patch of more than TILE rows."""
    own = tl.arange(0, TILE)
    live = end > start
    fits = live & (start >= 0) & (start < left) & (end <= TILE)
    return tl.min(tl.where(fits | ~live & (own < left), TILE, own), 0)


@triton.jit
def _long_rows(start, end, left, TILE: tl.constexpr):
    """Mask of a tile's leading rows that are in the patch of the first, as far as the window."""
    own = tl.arange(0, TILE)
    first = tl.max(tl.where(own == 0, end, 0), 0)
    return own < tl.minimum(first, left)


@triton.jit
def _bias(start, end, IS_CAUSAL: tl.constexpr, ABOVE: tl.constexpr, TILE: tl.constexpr):
    seen = seen_by(start, end, tl.arange(0, TILE), IS_CAUSAL, ABOVE)
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def _attend_whole(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, base, start, end, owned,
    total, q_stride, k_stride, v_stride, scale, kv_first,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """All heads of a tile of whole patches; returns 0, or NaN where something is not finite."""
    live, rows = end > start, base + tl.arange(0, TILE)
    bias = _bias(start, end, IS_CAUSAL, False, TILE)
    bad = tl.zeros((TILE, WIDTH), tl.float32)
    for kv_head in range(kv_first, kv_first + KV_HEADS):
        k = tile(k_ptr, rows, live, k_stride, kv_head * K, K, DOT, WIDTH)
        v = tile(v_ptr, rows, live, v_stride, kv_head * K, K, DOT, WIDTH)
        if ISOLATE:
            v, poison = harmless(v)
        for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if ISOLATE:
                s = tl.where(bias == 0.0, (s + poison[None, :]) * scale, float("-inf"))
            else:
                s = s * scale + bias
            top = tl.maximum(tl.max(s, 1), LOWEST)
            p = tl.exp2(s - top[:, None])
            norm = tl.where(live, tl.sum(p, 1), 1.0)
            acc = tl.dot(p.to(DOT), v, input_precision="ieee") * (1.0 / norm)[:, None]
            bad += acc * 0.0
            lse = tl.where(live, top + tl.log2(norm), 0.0)
            tl.store(lse_ptr + total * head + rows, lse, mask=owned)
            put(out_ptr, acc, rows, owned, H * K, head * K, K, WIDTH)
    return tl.sum(tl.sum(bad, 1), 0)


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_patch_attention_short_fwd(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, lse_ptr,
    n_patches, total, q_stride, k_stride, v_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = H // GROUP // KV_HEADS
    program, total = tl.program_id(0).to(tl.int64), total.to(tl.int64)
    kv_first, window = program % PARTS * KV_HEADS, program // PARTS * WINDOW
    limit = tl.minimum(window + WINDOW, total)
    patch, base = _first_own(cu_ptr, window, n_patches, total, TILE)
    while base < limit:
        start, end = patches_of(cu_ptr, patch, base, n_patches, total, TILE)
        left = (limit - base).to(tl.int32)
        count = _whole(start, end, left, TILE)
        if count > 0:
            owned = tl.arange(0, TILE) < count
            end = tl.where(owned, end, start)
            bad = _attend_whole(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, base, start, end, owned,
                total, q_stride, k_stride, v_stride, scale, kv_first,
                KV_HEADS, H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE, False,
            )  # fmt: skip
            if bad != 0.0:
                _attend_whole(
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, base, start, end, owned,
                    total, q_stride, k_stride, v_stride, scale, kv_first,
                    KV_HEADS, H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE, True,
                )  # fmt: skip
        else:
            owned = _long_rows(start, end, left, TILE)
            for head in range(kv_first * GROUP, (kv_first + KV_HEADS) * GROUP):
                attend(
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, base, start, end, owned,
                    total, q_stride, k_stride, v_stride, scale, head,
                    H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE,
                )  # fmt: skip
            count = tl.sum(owned.to(tl.int32), 0)
        base += tl.maximum(count, 1)


@triton.jit
def _gradients_whole(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, base, start, end, owned,
    total, q_stride, k_stride, v_stride, scale, unit, kv_first,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """All heads of a tile of whole patches; returns 0, or NaN where something is not finite."""
    KV: tl.constexpr = H // GROUP
    live, rows = end > start, base + tl.arange(0, TILE)
    bias = _bias(start, end, IS_CAUSAL, False, TILE)
    bias_t = bias  # the rows of a patch see one another
    if IS_CAUSAL:
        bias_t = _bias(start, end, True, True, TILE)
    bad = tl.zeros((TILE, WIDTH), tl.float32)
    for kv_head in range(kv_first, kv_first + KV_HEADS):
        k = tile(k_ptr, rows, live, k_stride, kv_head * K, K, DOT, WIDTH)
        v = tile(v_ptr, rows, live, v_stride, kv_head * K, K, DOT, WIDTH)
        if ISOLATE:
            k, of_k = harmless(k)
        dk, dv = tl.zeros((TILE, WIDTH), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
        for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
            grad = tile(grad_ptr, rows, live, H * K, head * K, K, DOT, WIDTH)
            shift = -tl.load(lse_ptr + total * head + rows, mask=live, other=0.0)
            if ISOLATE:
                q, of_q = harmless(q)
                grad, of_grad = harmless(grad)
                shift += of_q
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
            if ISOLATE:
                s = tl.where(bias == 0.0, s * scale + of_k[None, :], float("-inf"))
                dp = tl.where(bias == 0.0, dp + of_grad[:, None], 0.0)
                p = tl.where(bias == 0.0, tl.exp2(s + shift[:, None]), 0.0)
            else:
                p = tl.exp2(s * scale + bias + shift[:, None])
            delta = tl.sum(p * dp, 1)
            ds = p * (dp - delta[:, None])
            if ISOLATE:
                ds = tl.where(bias == 0.0, ds, 0.0)
            dq = tl.dot(ds.to(DOT), k, input_precision="ieee")
            bad += dq * 0.0
            put(dq_ptr, dq * unit, rows, owned, H * K, head * K, K, WIDTH)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
            if ISOLATE:
                p = tl.exp2(s * scale + (shift + of_grad)[None, :] + of_k[:, None])
                p = tl.where(bias_t == 0.0, p, 0.0)
                ds = tl.where(bias_t == 0.0, p * (dp - delta[None, :]), 0.0)
            else:
                p = tl.exp2(s * scale + bias_t + shift[None, :])
                ds = p * (dp - delta[None, :])
            dv = tl.dot(p.to(DOT), grad, dv, input_precision="ieee")
            dk = tl.dot(ds.to(DOT), q, dk, input_precision="ieee")
        put(dk_ptr, dk * unit, rows, owned, KV * K, kv_head * K, K, WIDTH)
        put(dv_ptr, dv, rows, owned, KV * K, kv_head * K, K, WIDTH)
    return tl.sum(tl.sum(bad, 1), 0)


@triton.jit
def _gradients_long(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit, kv_first,
    KV_HEADS: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All heads of a tile's rows of one longer patch."""
    for kv_head in range(kv_first, kv_first + KV_HEADS):
        for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
            of_queries(
                q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, base, start, end, owned,
                total, q_stride, k_stride, v_stride, scale, unit, head,
                H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE,
            )  # fmt: skip
        of_keys(
            q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dk_ptr, dv_ptr,
            base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit, kv_head,
            H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_patch_attention_short_bwd(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, cu_ptr, dq_ptr, dk_ptr, dv_ptr,
    n_patches, total, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = H // GROUP // KV_HEADS
    program, total = tl.program_id(0).to(tl.int64), total.to(tl.int64)
    kv_first, window = program % PARTS * KV_HEADS, program // PARTS * WINDOW
    limit = tl.minimum(window + WINDOW, total)
    patch, base = _first_own(cu_ptr, window, n_patches, total, TILE)
    while base < limit:
        start, end = patches_of(cu_ptr, patch, base, n_patches, total, TILE)
        left = (limit - base).to(tl.int32)
        count = _whole(start, end, left, TILE)
        if count > 0:
            owned = tl.arange(0, TILE) < count
            end = tl.where(owned, end, start)
            bad = _gradients_whole(
                q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
                base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit,
                kv_first, KV_HEADS, H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE, False,
            )  # fmt: skip
            if bad != 0.0:
                _gradients_whole(
                    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
                    base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit,
                    kv_first, KV_HEADS, H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE, True,
                )  # fmt: skip
        else:
            owned = _long_rows(start, end, left, TILE)
            _gradients_long(
                q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
                base, start, end, owned, total, q_stride, k_stride, v_stride, scale, unit,
                kv_first, KV_HEADS, H, GROUP, K, IS_CAUSAL, DOT, WIDTH, TILE,
            )  # fmt: skip
            count = tl.sum(owned.to(tl.int32), 0)
        base += tl.maximum(count, 1)
