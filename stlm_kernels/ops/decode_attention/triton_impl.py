"""decode_attention in Triton: split over the cache, combined in a fixed order.

Forward. A program owns one part of one sequence's range under the query heads of one key head,
which are the rows of its products (padded to 16): the cache is read once for all of them. How many
parts there are follows from shapes alone; how long they are, from the sequence's own length, so
that every program of a sequence has the same work however full the cache is. The range begins at
the window, so nothing before it is passed over. Softmax in base 2, fp32, carried along.
Combine. With more than one part, the first kernel leaves fp32 results and log-sum-exps, and a
program for each head adds them up by weight. With one part the first kernel's result is final.

A part without entries has the weight 0 and the result 0. No row beyond the range is loaded.
Memory limits, not products: 16-row products run on the warp-wide matrix instruction everywhere.

Floor (bf16): 4 L H_kv K bytes for each sequence: 0.5 us for one of 2048 entries with 4 heads of 64
(two launches take longer), 31 and 125 us for 64 of 2048 and 8192 entries at 4.3 TB/s; L H exps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type
from . import config as configs

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _capped(z, cap):
    """cap * tanh(z / cap), by what the interpreter knows; a series where digits would cancel."""
    x = z / cap
    square = x * x
    series = 1.0 - square * (0.33333334 - square * (0.13333334 - square * 0.053968254))
    tanh = tl.where(square < 0.01, x * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
    return cap * tanh


@triton.jit
def _length(lens_ptr, batch, capacity):
    """Entries of the cache in use, safe for any length."""
    return tl.minimum(tl.maximum(tl.load(lens_ptr + batch).to(tl.int64), 0), capacity)


@triton.jit(do_not_specialize=["rows", "splits", "capacity", "window"])
def stlm_decode_attention_fwd(
    q_ptr, k_ptr, v_ptr, lens_ptr, out_ptr, lse_ptr,
    rows, splits, capacity, window,
    k_batch, k_row, k_head, v_batch, v_row, v_head, scale, cap,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAPPED: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split, program = program % splits, program // splits
    tile, program = program % tl.cdiv(GROUP, HEADS), program // tl.cdiv(GROUP, HEADS)
    kv_head, batch = program % (H // GROUP), program // (H // GROUP)
    end = _length(lens_ptr, batch, capacity)
    start = tl.maximum(end - window, 0)
    run = tl.cdiv(tl.cdiv(end - start, BLOCK), splits) * BLOCK
    low = start + split * run
    high = tl.minimum(low + run, end)
    members, d = tile * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    row = batch * H + kv_head * GROUP + members
    live = (members < GROUP)[:, None] & (d < K)[None, :]
    q = tl.load(q_ptr + row[:, None] * K + d[None, :], mask=live, other=0.0).to(DOT)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    norm = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    for first in range(low, high, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        seen = entries < high
        mask = seen[:, None] & (d < K)[None, :]
        k = tl.load(k_ptr + entries[:, None] * k_row + d[None, :], mask=mask, other=0.0).to(DOT)
        v = tl.load(v_ptr + entries[:, None] * v_row + d[None, :], mask=mask, other=0.0).to(DOT)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if IS_CAPPED:
            z = _capped(z, cap)
        z = tl.where(seen[None, :], z * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(z - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    # Without any weight a part is 0; where it is the whole and something was seen, NaN.
    weightless = norm == 0.0
    acc = acc / tl.where(weightless & ((splits > 1) | (end <= start)), 1.0, norm)[:, None]
    place = split * rows + row
    lse = top + tl.log2(tl.where(weightless, 1.0, norm))
    tl.store(lse_ptr + place, lse, mask=members < GROUP)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * K + d[None, :], out, mask=live)


@triton.jit(do_not_specialize=["rows", "splits", "capacity"])
def stlm_decode_attention_combine(
    part_ptr, lse_ptr, lens_ptr, out_ptr,
    rows, splits, capacity,
    H: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    parts, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    exists = parts < splits
    place = parts.to(tl.int64) * rows + row
    lse = tl.load(lse_ptr + place, mask=exists, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    mask = exists[:, None] & (d < K)[None, :]
    part = tl.load(part_ptr + place[:, None] * K + d[None, :], mask=mask, other=0.0)
    norm = tl.where(_length(lens_ptr, row // H, capacity) > 0, tl.sum(weights, 0), 1.0)
    out = tl.sum(weights[:, None] * part, 0) / norm
    tl.store(out_ptr + row * K + d, out.to(out_ptr.dtype.element_ty), mask=d < K)


def launch_fwd(
    q: Tensor,  # (B, H, K)
    k_cache: Tensor,  # (B, C, H_kv, K)
    v_cache: Tensor,  # (B, C, H_kv, K)
    cache_lens: Tensor,  # (B,) int32
    window: int,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """(B, H, K) in `out_dtype`."""
    (batch, heads, width), (_, capacity, kv_heads, _) = q.shape, k_cache.shape
    k, v, lens = _with_rows(k_cache), _with_rows(v_cache), cache_lens.contiguous()
    config = configs.fwd_config(width, _launch.amount(k.numel()), k.dtype, out_dtype, q.device)
    group, rows, block_k = heads // kv_heads, batch * heads, configs.width_block(width)
    tiles = batch * kv_heads * _launch.ceil_div(group, configs.heads_block(group))
    programs = config.pop("PROGRAMS")
    splits = configs.split_count(window, max(1, tiles), config["BLOCK"], programs)
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    part = out if splits == 1 else out.new_empty((splits, rows, width), dtype=torch.float32)
    lse = torch.empty((splits, rows), dtype=torch.float32, device=q.device)
    _launch.launch(
        stlm_decode_attention_fwd, tiles * splits,
        q.contiguous(), k, v, lens, part, lse, rows, splits, capacity, window,
        *k.stride()[:3], *v.stride()[:3], scale, softcap,
        H=heads, GROUP=group, K=width, IS_CAPPED=softcap > 0, DOT=dot_type(out_dtype),
        WIDTH=block_k, HEADS=configs.heads_block(group), device=q.device, **config,
    )  # fmt: skip
    if splits > 1:
        _launch.launch(
            stlm_decode_attention_combine, rows,
            part, lse, lens, out, rows, splits, capacity,
            H=heads, K=width, WIDTH=block_k, SPLITS=1 << (splits - 1).bit_length(),
            device=q.device, **configs.combine_config(width, q.device),
        )  # fmt: skip
    return out


def _with_rows(x: Tensor) -> Tensor:
    """A cache is read where it lies; only one whose last stride is not 1 is copied."""
    return x if x.stride(3) == 1 else x.contiguous()
