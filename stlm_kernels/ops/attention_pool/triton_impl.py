"""attention_pool in Triton: tiles of some patches by some of their bytes, walked to their ends.

A tile has five axes: patches, bytes of a patch, key heads, the queries that share a key head, and
the columns of a head. Neighbouring columns and heads are neighbours in memory, so a row of key is
read in full lines, and queries that share a key head share its load.
Forward. A program owns BLOCK_P patches and takes BLOCK_S bytes of each at a time, with the softmax
carried along (base 2, fp32): patches of average length are over in a step or two, a long one loops.
Backward. A program owns a run of patches, and with them the gradients of their bytes, which are
written once. The weights are formed again from the saved log-sum-exp, twice: once for delta, the
sum of weight times its gradient over a patch, and once for the gradients. Delta from a 16-bit
`out` would be wrong by as much as short patches' gradients are large; the second reading comes from
cache. A shared query's gradient is added up within a run, and over runs in a fixed order.
Rows of no patch get their zeros from all programs in equal shares.

A lane that has no byte loads zeros and weighs nothing, and no lane sees another patch: NaN stays.
Floor (bf16): 4 T H_kv K bytes forward, 8 T H_kv K backward, and 2 P H K for each tensor by patch:
the forward takes 135 us at 1M bytes, mean patch 6, H = H_kv = 8, K = 16, 4.3 TB/s, the backward
260; 4 and 10 T H K FLOPs on no tensor core, T H exps, in the backward twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, segment_bounds, sum_splits, with_rows
from . import config as configs

LOG2_E = 1.4426950408889634
FUSES = False
"""A product fused into the first sum across lanes is rounded in one of two lanes only: lanes that
should hold the same sum would then store values that differ in the last bit to one address."""


@triton.jit
def _heads(tile, KV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
           BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Offsets of a tile of heads into a row of key, of query and of lse, each with its mask."""
    kv = (tile * BLOCK_H + tl.arange(0, BLOCK_H))[None, None, :, None, None]
    member = tl.arange(0, BLOCK_G)[None, None, None, :, None]
    d = tl.arange(0, WIDTH)[None, None, None, None, :]
    head = kv * GROUP + member
    exists = (kv < KV) & (member < GROUP)
    return kv * K + d, (kv < KV) & (d < K), head * K + d, exists & (d < K), head, exists


@triton.jit
def _patches(cu_ptr, first, last, total, BLOCK_P: tl.constexpr):
    """BLOCK_P patches in their axis, which of them exist, and where they start and end."""
    patches = first + tl.arange(0, BLOCK_P)
    start, end = segment_bounds(cu_ptr, patches, patches < last, total)
    longest = tl.max(end - start).to(tl.int32)
    patches, start, end = (
        patches[:, None, None, None, None],
        start[:, None, None, None, None],
        end[:, None, None, None, None],
    )
    return patches, patches < last, start, end, longest


@triton.jit
def _load(x_ptr, offsets, mask, DOT: tl.constexpr):
    """Load in fp32, cast to the compute dtype; zeros where nothing may be read."""
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(DOT).to(tl.float32)


@triton.jit
def _scores(q, k, live, scale):
    """(patches, bytes, key heads, queries, 1) in powers of two; -inf where there is no byte."""
    return tl.where(live, tl.sum(q * k, 4, keep_dims=True) * scale, float("-inf"))


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_attention_pool_fwd(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, lse_ptr,
    n_patches, total, q_stride, k_stride, v_stride, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (KV + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    kv_place, kv_mask, q_place, q_mask, head, exists = _heads(
        program % TILES, KV, GROUP, K, BLOCK_H, BLOCK_G, WIDTH
    )
    patches, own, start, end, longest = _patches(
        cu_ptr, program // TILES * BLOCK_P, n_patches, total, BLOCK_P
    )
    q = _load(q_ptr, patches * q_stride + q_place, own & q_mask, DOT)
    top = tl.full((BLOCK_P, 1, BLOCK_H, BLOCK_G, 1), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_P, 1, BLOCK_H, BLOCK_G, 1), tl.float32)
    acc = tl.zeros((BLOCK_P, 1, BLOCK_H, BLOCK_G, WIDTH), tl.float32)
    for first in range(0, longest, BLOCK_S):
        rows = start + first + tl.arange(0, BLOCK_S)[None, :, None, None, None]
        live = rows < end
        k = _load(k_ptr, rows * k_stride + kv_place, live & kv_mask, DOT)
        v = _load(v_ptr, rows * v_stride + kv_place, live & kv_mask, DOT)
        s = _scores(q, k, live, scale)
        new_top = tl.maximum(top, tl.max(s, 1, keep_dims=True))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)  # a patch that is over, or empty
        p = tl.exp2(s - pivot)
        shrink = tl.exp2(top - pivot)
        norm = norm * shrink + tl.sum(p, 1, keep_dims=True)
        acc = acc * shrink + tl.sum(p * v, 1, keep_dims=True)
        top = new_top
    filled = end > start
    norm = tl.where(filled, norm, 1.0)
    lse = tl.where(filled, top + tl.log2(norm), 0.0)
    tl.store(lse_ptr + patches * (KV * GROUP) + head, lse, mask=own & exists)
    out = (acc / norm).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + patches * (KV * GROUP * K) + q_place, out, mask=own & q_mask)


@triton.jit
def _weights(k_ptr, v_ptr, rows, k_stride, v_stride, place, mask, live, q, grad, lse, scale,
             DOT: tl.constexpr):  # fmt: skip
    """key, the weight of each byte, and the gradient of that weight."""
    k = _load(k_ptr, rows * k_stride + place, live & mask, DOT)
    v = _load(v_ptr, rows * v_stride + place, live & mask, DOT)
    return k, tl.exp2(_scores(q, k, live, scale) - lse), tl.sum(grad * v, 4, keep_dims=True)


@triton.jit
def _zero_rows_of_no_patch(
    dk_ptr, dv_ptr, cu_ptr, n_patches, total, first, last, place, mask,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store zeros in the gradients of rows `first` to `last`, where outside the boundaries."""
    low = tl.maximum(tl.load(cu_ptr).to(tl.int64), 0)
    high = tl.load(cu_ptr + n_patches).to(tl.int64)
    step = tl.arange(0, BLOCK)[None, :, None, None, None]
    begin = tl.where(low > 0, first, tl.maximum(first, high))
    for row in range(begin, tl.minimum(last, total), BLOCK):
        rows = row + step
        outside = (rows < tl.minimum(last, total)) & ((rows >= high) | (rows < low)) & mask
        zeros = tl.zeros(outside.shape, tl.float32)
        tl.store(dk_ptr + rows * ROW + place, zeros.to(dk_ptr.dtype.element_ty), mask=outside)
        tl.store(dv_ptr + rows * ROW + place, zeros.to(dv_ptr.dtype.element_ty), mask=outside)


@triton.jit(do_not_specialize=["n_patches", "total", "run", "share"])
def stlm_attention_pool_bwd(
    q_ptr, k_ptr, v_ptr, cu_ptr, grad_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    n_patches, total, run, share, q_stride, k_stride, v_stride, scale, unit,
    KV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
    IS_SHARED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (KV + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    part = program // TILES
    kv_place, kv_mask, q_place, q_mask, head, exists = _heads(
        program % TILES, KV, GROUP, K, BLOCK_H, BLOCK_G, WIDTH
    )
    slots = tl.arange(0, BLOCK_S)[None, :, None, None, None]
    last = tl.minimum((part + 1) * run, n_patches)
    dq_run = tl.zeros((1, 1, BLOCK_H, BLOCK_G, WIDTH), tl.float32)
    for block in range(part * run, last, BLOCK_P):
        patches, own, start, end, longest = _patches(cu_ptr, block, last, total, BLOCK_P)
        own_row = patches * (KV * GROUP * K) + q_place
        q = _load(q_ptr, patches * q_stride + q_place, own & q_mask, DOT)
        grad = _load(grad_ptr, own_row, own & q_mask & (end > start), tl.float32)
        lse = tl.load(lse_ptr + patches * (KV * GROUP) + head, mask=own & exists, other=0.0)
        delta = tl.zeros((BLOCK_P, 1, BLOCK_H, BLOCK_G, 1), tl.float32)
        for first in range(0, longest, BLOCK_S):
            rows = start + first + slots
            _, p, dp = _weights(
                k_ptr, v_ptr, rows, k_stride, v_stride, kv_place, kv_mask, rows < end,
                q, grad, lse, scale, DOT,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1, keep_dims=True)
        dq = tl.zeros((BLOCK_P, 1, BLOCK_H, BLOCK_G, WIDTH), tl.float32)
        for first in range(0, longest, BLOCK_S):
            rows = start + first + slots
            live = rows < end
            k, p, dp = _weights(
                k_ptr, v_ptr, rows, k_stride, v_stride, kv_place, kv_mask, live,
                q, grad, lse, scale, DOT,
            )  # fmt: skip
            ds = tl.where(live, p * (dp - delta), 0.0)
            dk = (tl.sum(ds * q, 3, keep_dims=True) * unit).to(dk_ptr.dtype.element_ty)
            dv = tl.sum(p * grad, 3, keep_dims=True).to(dv_ptr.dtype.element_ty)
            tl.store(dk_ptr + rows * (KV * K) + kv_place, dk, mask=live & kv_mask)
            tl.store(dv_ptr + rows * (KV * K) + kv_place, dv, mask=live & kv_mask)
            dq += tl.sum(ds * k, 1, keep_dims=True)
        if IS_SHARED:
            dq_run += tl.sum(dq, 0, keep_dims=True) * unit
        else:
            tl.store(dq_ptr + own_row, (dq * unit).to(dq_ptr.dtype.element_ty), mask=own & q_mask)
    if IS_SHARED:
        tl.store(dq_ptr + part * (KV * GROUP * K) + q_place, dq_run, mask=q_mask)
    _zero_rows_of_no_patch(
        dk_ptr, dv_ptr, cu_ptr, n_patches, total, part * share, (part + 1) * share,
        kv_place, kv_mask, KV * K, BLOCK_P * BLOCK_S,
    )  # fmt: skip


def launch_fwd(
    query: Tensor,  # (H, K) or (P, H, K)
    key: Tensor,  # (T, H_kv, K)
    value: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(P, H, K) in `out_dtype`, and (P, H) fp32 log2-sum-exp2."""
    total, patches, device = key.shape[0], cu_patchlens.shape[0] - 1, key.device
    heads, width = query.shape[-2:]
    out = torch.empty((patches, heads, width), dtype=out_dtype, device=device)
    lse = torch.empty((patches, heads), dtype=torch.float32, device=device)
    query, key, value = query.contiguous(), with_rows(key), with_rows(value)
    options, tiles = _options("fwd", query, key, patches, out_dtype)
    _launch.launch(
        stlm_attention_pool_fwd, _launch.ceil_div(patches, options["BLOCK_P"]) * tiles,
        query, key, value, cu_patchlens.contiguous(), out, lse,
        patches, total, _row_stride(query), key.stride(0), value.stride(0), scale * LOG2_E,
        enable_fp_fusion=FUSES, device=device, **options,
    )  # fmt: skip
    return out, lse


def launch_bwd(
    grad: Tensor,  # (P, H, K)
    query: Tensor,  # (H, K) or (P, H, K)
    key: Tensor,  # (T, H_kv, K)
    value: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    lse: Tensor,  # (P, H)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    total, patches, device = key.shape[0], grad.shape[0], key.device
    dkey = torch.empty(key.shape, dtype=key.dtype, device=device)
    dvalue = torch.empty(value.shape, dtype=value.dtype, device=device)
    query, key, value = query.contiguous(), with_rows(key), with_rows(value)
    options, tiles = _options("bwd", query, key, patches, grad.dtype)
    fold, shared = options.pop("FOLD"), query.ndim == 2
    runs, run = _launch.splits(patches, tiles, options.pop("PROGRAMS"), options["BLOCK_P"])
    if not shared:
        runs, run = max(1, _launch.ceil_div(patches, options["BLOCK_P"])), options["BLOCK_P"]
    elif runs > fold:
        runs = _launch.ceil_div(runs, fold) * fold
    partial = (runs, *query.shape) if shared else query.shape
    dquery = torch.empty(partial, dtype=torch.float32 if shared else query.dtype, device=device)
    _launch.launch(
        stlm_attention_pool_bwd, runs * tiles,
        query, key, value, cu_patchlens.contiguous(), grad.contiguous(), lse, dquery, dkey, dvalue,
        patches, total, run, _launch.ceil_div(total, runs),
        _row_stride(query), key.stride(0), value.stride(0), scale * LOG2_E, scale,
        IS_SHARED=shared, enable_fp_fusion=FUSES, device=device, **options,
    )  # fmt: skip
    return _sum_of_runs(dquery, fold, query.dtype) if shared else dquery, dkey, dvalue


def _sum_of_runs(partial: Tensor, fold: int, dtype: torch.dtype) -> Tensor:
    """Many runs are added up in two steps, so that no program adds up thousands in a row."""
    if partial.shape[0] > fold:
        folded = partial.view(-1, fold, *partial.shape[1:])
        partial = sum_splits(folded, torch.float32)
    return sum_splits(partial, dtype)


def _row_stride(query: Tensor) -> int:
    """Elements from one patch's query to the next; a shared query is every patch's."""
    return 0 if query.ndim == 2 else query.shape[1] * query.shape[2]


def _options(
    kernel: str, query: Tensor, key: Tensor, patches: int, dtype: torch.dtype
) -> tuple[dict[str, Any], int]:
    """Constants of a launch and tiles of heads; `dtype` is what operands are cast to."""
    (heads, width), (total, kv_heads, _) = query.shape[-2:], key.shape
    config = configs.pool_config(kernel, heads, key)
    block_p, block_s = configs.tile_shape(config.pop("ROWS"), total, patches)
    constants = {
        "KV": kv_heads,
        "GROUP": heads // kv_heads,
        "K": width,
        "DOT": dot_type(dtype),
        "BLOCK_P": block_p,
        "BLOCK_S": block_s,
        "BLOCK_G": configs.power_above(heads // kv_heads),
        "WIDTH": configs.power_above(width),
    }
    return config | constants, _launch.ceil_div(kv_heads, config["BLOCK_H"])
