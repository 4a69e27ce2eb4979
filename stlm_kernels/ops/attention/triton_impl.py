"""attention in Triton: causal, within a window and a document, query heads sharing key heads.

A batch is read as one stream of N = B T rows. Where row t starts to see, and the row where key t is
seen last, are plain numbers: those of its sequence cut to the window, or, with documents, two int32
a row that one pass notes beforehand. Heads of 48 are 32 + 16 columns, in two products each.
Forward. A program owns BLOCK rows of one query head and walks the range of keys that any of them
sees, INNER at a time, carrying the softmax (base 2, fp32). First come the blocks that every row
sees whole, without a mask; then the others, at the diagonal and where window or document begin.
Long rows start first, so that short ones fill the device's last moments.
Backward. From the saved log-sum-exp the weights are formed again. One kernel owns BLOCK queries and
adds up dq = dS K; it also stores delta = rowsum(dO * out), corrected for the rounding of `out` in
tiles that see few keys (a row of dS adds up to zero: what it does add up to is delta's error). The
other owns BLOCK keys of one key head and walks the query heads that share it, forming
S^T = K Q^T and dP^T = V dO^T directly, so that no accumulator is ever transposed:
dv = P^T dO, dk = dS^T Q. No atomics, fixed order, work in proportion to T x window.

NaN and infinities. A weight of zero does not hide a NaN, so in masked blocks an operand that is
summed over rows enters the product with its non-finite rows zeroed, and the scores of such a row
become NaN instead, before the mask: what may see it gets NaN, nothing else does. Unmasked blocks
need no such care.

Floor (bf16, H200, 790 TFLOP/s, 4.3 TB/s, 4e12 exp/s): per score 4 K FLOPs and an exp2 forward,
14 K and two exp2 backward; below K = 50 the exp2 lasts longer than the products. B24 T512 16/4
heads K32: 50 M scores, 13 us forward, 29 us backward. 8 x 8192, H8 K64, window 128: 63 and 126 us
of memory traffic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.heads import (
    clean,
    difference,
    inner,
    load_head,
    products,
    scaled,
    store_head,
    summed,
    zeros,
)
from ..._triton.sight import FARTHEST, place, range_of, sight
from ..._triton.tiles import LOG2_E, dot_type, row_bounds, with_rows
from . import config as configs


@triton.jit
def _within(rows, high, MASKED: tl.constexpr):
    """Mask of the rows of a block to read: all of a solid one."""
    if MASKED:
        return rows < high
    else:
        return tl.full(rows.shape, True, tl.int1)


@triton.jit
def _sees(inner, first, last):
    """(rows of a tile, inner): each row meets those from its first to before its last."""
    return (inner[None, :] >= first[:, None]) & (inner[None, :] < last[:, None])


@triton.jit
def _absorb(
    q, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column, scale,
    top, norm, acc, DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys into the softmax of every row; `top` is the largest product so far."""
    within = _within(keys, high, MASKED)
    k = load_head(k_ptr, there + keys, within, k_stride, column, DOT, MAIN, REST)
    v = load_head(v_ptr, there + keys, within, v_stride, column, DOT, MAIN, REST)
    s = products(q, k)
    if MASKED:
        v, poison = clean(v)
        seen = _sees(keys, first, last)
        s = tl.where(seen, s + poison[None, :], float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * scale  # it may have seen nothing yet
    p = tl.exp2(s * scale - pivot[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp2(top * scale - pivot)
    norm = norm * shrink + tl.sum(p, 1)
    return new_top, norm, summed(p, v, scaled(acc, shrink))


@triton.jit(do_not_specialize=["total", "length", "other", "whole", "before", "behind"])
def stlm_attention_fwd(
    q_ptr, k_ptr, v_ptr, bounds_ptr, out_ptr, lse_ptr,
    total, length, other, whole, before, behind, q_stride, k_stride, v_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, DOT: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head, block = program % H, program // H
    base, end, there = place(block, length, other, whole, BLOCK)
    rows = base + tl.arange(0, BLOCK)
    first, last = sight(
        bounds_ptr, base, end, there, length, other, before, behind, HAS_DOCS, BLOCK
    )
    live, low, high, count, lead, solid = range_of(first, last, INNER)
    q = load_head(q_ptr, rows, live, q_stride, head * K, DOT, MAIN, REST)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm, acc = tl.zeros((BLOCK,), tl.float32), zeros(BLOCK, MAIN, REST)
    column = head // GROUP * K
    for i in range(lead, lead + solid):
        keys = low + i * INNER + tl.arange(0, INNER)
        top, norm, acc = _absorb(
            q, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column, scale,
            top, norm, acc, DOT, MAIN, REST, False,
        )  # fmt: skip
    for i in range(0, count - solid):
        keys = low + (i + tl.where(i < lead, 0, solid)) * INNER + tl.arange(0, INNER)
        top, norm, acc = _absorb(
            q, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column, scale,
            top, norm, acc, DOT, MAIN, REST, True,
        )  # fmt: skip
    norm = tl.where(live, norm, 1.0)
    lse = tl.where(live, top * scale + tl.log2(norm), 0.0)
    tl.store(lse_ptr + head * total + rows, lse, mask=rows < end)
    store_head(out_ptr, scaled(acc, 1.0 / norm), rows, live, end, H * K, head * K, MAIN, REST)


@triton.jit
def _gradient(s, dp, shift, delta, seen, MASKED: tl.constexpr):
    """Weights, formed again, and the gradient of the scores."""
    p = tl.exp2(s + shift)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta)
    if MASKED:  # what is masked may be NaN in dp
        ds = tl.where(seen, ds, 0.0)
    return p, ds


@triton.jit
def _of_keys(
    q, grad, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column, scale,
    lse, delta, DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of keys, and its weights and gradients of the scores, (rows, keys)."""
    within = _within(keys, high, MASKED)
    k = load_head(k_ptr, there + keys, within, k_stride, column, DOT, MAIN, REST)
    v = load_head(v_ptr, there + keys, within, v_stride, column, DOT, MAIN, REST)
    seen = _sees(keys, first, last)
    shift = -lse[:, None]
    if MASKED:
        k, poison = clean(k)
        shift += poison[None, :]
    s, dp = products(q, k) * scale, products(grad, v)
    p, ds = _gradient(s, dp, shift, delta[:, None], seen, MASKED)
    return k, p, ds


@triton.jit(do_not_specialize=["total", "length", "other", "whole", "before", "behind"])
def stlm_attention_bwd_q(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, bounds_ptr, dq_ptr, delta_ptr,
    total, length, other, whole, before, behind, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, DOT: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    NARROW: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head, block = program % H, program // H
    base, end, there = place(block, length, other, whole, BLOCK)
    rows = base + tl.arange(0, BLOCK)
    first, last = sight(
        bounds_ptr, base, end, there, length, other, before, behind, HAS_DOCS, BLOCK
    )
    live, low, high, count, lead, solid = range_of(first, last, INNER)
    q = load_head(q_ptr, rows, live, q_stride, head * K, DOT, MAIN, REST)
    grad = load_head(grad_ptr, rows, live, H * K, head * K, DOT, MAIN, REST)
    delta = inner(grad, load_head(out_ptr, rows, live, H * K, head * K, tl.float32, MAIN, REST))
    lse = tl.load(lse_ptr + head * total + rows, mask=live, other=0.0)
    dq, mean = zeros(BLOCK, MAIN, REST), zeros(BLOCK, MAIN, REST)
    excess, column = tl.zeros((BLOCK,), tl.float32), head // GROUP * K
    for i in range(lead, lead + solid):
        keys = low + i * INNER + tl.arange(0, INNER)
        k, _, ds = _of_keys(
            q, grad, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column,
            scale, lse, delta, DOT, MAIN, REST, False,
        )  # fmt: skip
        dq = summed(ds, k, dq)
    for i in range(0, count - solid):
        keys = low + (i + tl.where(i < lead, 0, solid)) * INNER + tl.arange(0, INNER)
        k, p, ds = _of_keys(
            q, grad, k_ptr, v_ptr, there, keys, high, first, last, k_stride, v_stride, column,
            scale, lse, delta, DOT, MAIN, REST, True,
        )  # fmt: skip
        dq = summed(ds, k, dq)
        if NARROW:
            excess += tl.sum(ds, 1)
            mean = summed(p, k, mean)
    if NARROW:
        # Rows with a solid block see so many keys that the rounding of `out` averages away.
        excess = tl.where(solid == 0, excess, 0.0)
        dq = difference(dq, scaled(mean, excess))
        delta += excess
    tl.store(delta_ptr + head * total + rows, tl.where(live, delta, 0.0), mask=rows < end)
    dq = scaled(dq, tl.zeros((BLOCK,), tl.float32) + unit)
    store_head(dq_ptr, dq, rows, live, end, H * K, head * K, MAIN, REST)


@triton.jit
def _of_rows(
    k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, there, rows, high, first, last, q_stride, width,
    column, scale, DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of queries and its upstream gradient, weights and gradients of the scores, (keys,
    rows)."""
    inside, at = _within(rows, high, MASKED), there + rows
    q = load_head(q_ptr, at, inside, q_stride, column, DOT, MAIN, REST)
    grad = load_head(grad_ptr, at, inside, width, column, DOT, MAIN, REST)
    shift = -tl.load(lse_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    seen = _sees(rows, first, last)
    if MASKED:
        q, poison = clean(q)
        grad, more = clean(grad)
        shift += poison + more
    s, dp = products(k, q) * scale, products(v, grad)
    p, ds = _gradient(s, dp, shift[None, :], delta[None, :], seen, MASKED)
    return q, grad, p, ds


@triton.jit(do_not_specialize=["total", "length", "other", "whole", "before", "behind"])
def stlm_attention_bwd_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, bounds_ptr, dk_ptr, dv_ptr,
    total, length, other, whole, before, behind, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, HAS_DOCS: tl.constexpr, DOT: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    KV: tl.constexpr = H // GROUP
    program = tl.program_id(0).to(tl.int64)
    kv_head, block = program % KV, program // KV
    base, end, there = place(block, length, other, whole, BLOCK)
    keys = base + tl.arange(0, BLOCK)
    first, last = sight(
        bounds_ptr, base, end, there, length, other, before, behind, HAS_DOCS, BLOCK
    )
    live, low, high, count, lead, solid = range_of(first, last, INNER)
    k = load_head(k_ptr, keys, live, k_stride, kv_head * K, DOT, MAIN, REST)
    v = load_head(v_ptr, keys, live, v_stride, kv_head * K, DOT, MAIN, REST)
    dk, dv = zeros(BLOCK, MAIN, REST), zeros(BLOCK, MAIN, REST)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        for i in range(lead, lead + solid):
            rows = low + i * INNER + tl.arange(0, INNER)
            q, grad, p, ds = _of_rows(
                k, v, q_ptr, grad_ptr, lse_ptr + head * total, delta_ptr + head * total,
                there, rows, high, first, last, q_stride, H * K, head * K, scale, DOT, MAIN,
                REST, False,
            )  # fmt: skip
            dv = summed(p, grad, dv)
            dk = summed(ds, q, dk)
        for i in range(0, count - solid):
            rows = low + (i + tl.where(i < lead, 0, solid)) * INNER + tl.arange(0, INNER)
            q, grad, p, ds = _of_rows(
                k, v, q_ptr, grad_ptr, lse_ptr + head * total, delta_ptr + head * total,
                there, rows, high, first, last, q_stride, H * K, head * K, scale, DOT, MAIN,
                REST, True,
            )  # fmt: skip
            dv = summed(p, grad, dv)
            dk = summed(ds, q, dk)
    dk = scaled(dk, tl.zeros((BLOCK,), tl.float32) + unit)
    store_head(dk_ptr, dk, keys, live, end, KV * K, kv_head * K, MAIN, REST)
    store_head(dv_ptr, dv, keys, live, end, KV * K, kv_head * K, MAIN, REST)


def launch_fwd(
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K)
    v: Tensor,  # (B, T_kv, H_kv, K)
    cu_seqlens: Tensor | None,  # (S+1,) int32, with B = 1
    cu_seqlens_k: Tensor | None,  # (S+1,) int32; None: cu_seqlens
    left: int | None,
    right: int | None,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H, K) in `out_dtype`, (H, B T) fp32 log2-sum-exp2, (2, T) int32 bounds of each row."""
    (batch, length, heads, _), keys, device = q.shape, k.shape[1], q.device
    total, sides = batch * length, _sides(left, right)
    out = torch.empty(q.shape, dtype=out_dtype, device=device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=device)
    bounds = _bounds(cu_seqlens, cu_seqlens_k, length, keys, sides, device)
    has_docs = cu_seqlens is not None
    options = _options("fwd", q, k, has_docs, sides, out_dtype)
    whole, tiles = _tiles_of(batch, length, keys, has_docs, options["BLOCK"])
    q, k, v = (with_rows(x.flatten(0, 1)) for x in (q, k, v))
    _launch.launch(
        stlm_attention_fwd, tiles * heads,
        q, k, v, bounds, out, lse,
        total, length, keys, whole, *sides, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E,
        device=device, **options,
    )  # fmt: skip
    return out, lse, bounds


def launch_bwd(
    grad: Tensor,  # (B, T, H, K)
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K)
    v: Tensor,  # (B, T_kv, H_kv, K)
    out: Tensor,  # (B, T, H, K)
    lse: Tensor,  # (H, B T)
    bounds: Tensor,  # (2, T), or (2, 0) without documents
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the second kernel reads what the first noted of each row."""
    (batch, length, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    device, sides, has_docs = q.device, _sides(left, right), cu_seqlens is not None
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    of_q, of_kv = (_options(x, q, k, has_docs, sides, grad.dtype) for x in ("bwd_q", "bwd_kv"))
    other = None if cu_seqlens is None else cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens
    key_bounds = _bounds(other, cu_seqlens, keys, length, sides[::-1], device)
    total, delta = lse.shape[1], torch.empty_like(lse)
    q, k, v = (with_rows(x.flatten(0, 1)) for x in (q, k, v))
    grad, out = grad.contiguous(), out.contiguous()
    last = q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E, scale
    whole, tiles = _tiles_of(batch, length, keys, has_docs, of_q["BLOCK"])
    _launch.launch(
        stlm_attention_bwd_q, tiles * heads,
        q, k, v, grad, out, lse, bounds, dq, delta,
        total, length, keys, whole, *sides, *last, device=device, **of_q,
    )  # fmt: skip
    whole, tiles = _tiles_of(batch, keys, length, has_docs, of_kv["BLOCK"])
    _launch.launch(
        stlm_attention_bwd_kv, tiles * kv_heads,
        q, k, v, grad, lse, delta, key_bounds, dk, dv,
        total, keys, length, whole, *sides[::-1], *last, device=device, **of_kv,
    )  # fmt: skip
    return dq, dk, dv


def _sides(left: int | None, right: int | None) -> tuple[int, int]:
    left, right = (FARTHEST if x is None else min(x, FARTHEST) for x in (left, right))
    return left, right


def _bounds(
    cu: Tensor | None, other: Tensor | None, rows: int, others: int, sides: tuple[int, int],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Range of the other side's rows that each row of packed documents meets, (2, rows) int32."""
    if cu is None:
        return torch.empty((2, 0), dtype=torch.int32, device=device)
    return row_bounds(cu, rows, *sides, cu if other is None else other, others)


def _tiles_of(batch: int, rows: int, others: int, has_docs: bool, block: int) -> tuple[int, int]:
    """Rows that tiles divide, and the tiles of all: the whole stream if both sides are alike."""
    whole = batch * rows if has_docs or rows == others else rows
    return whole, batch * rows // max(1, whole) * _launch.ceil_div(whole, block)


def _options(
    kernel: str, q: Tensor, k: Tensor, has_docs: bool, sides: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """The constants of a launch; `dtype` is what the products' operands are cast to."""
    (heads, width), reach = q.shape[2:], min(sum(sides) + 1, k.shape[1])
    return configs.rows_config(kernel, width, reach, dtype, q.device) | {
        "H": heads,
        "GROUP": heads // k.shape[2],
        "HAS_DOCS": has_docs,
        "DOT": dot_type(dtype),
        "MAIN": configs.main_columns(width),
        "REST": width - configs.main_columns(width),
    }
