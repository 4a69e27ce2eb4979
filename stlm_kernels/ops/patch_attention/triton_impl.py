"""patch_attention in Triton: tiles of the flat byte stream under a block-diagonal mask.

Short patches, by their mean length, are `short_impl`'s. Here patches are long, so a program owns
BLOCK rows of one head and loops over what they can see.

Bounds. One pass finds where the patch of each row starts and ends, by bisection; the kernels below
read these 8 bytes a row instead of searching. Rows of no patch get an empty range. Two rows lie in
one patch where their starts are equal; within a tile rows are counted from its first, in int32.
Forward. What a tile can see is one range of rows, from the start of the first row's patch to the
end of the last row's, in steps of INNER keys, with the softmax carried along (base 2, fp32).
Backward. From the saved log-sum-exp the weights are formed again. One kernel owns BLOCK queries and
adds up dq = dS K; it also stores delta = rowsum(dO * out). A 16-bit `out` makes delta wrong,
which short patches show: as a row of dS adds up to zero, what it does add up to is delta's
error, which is taken out at the end. The other owns BLOCK keys of one key head and walks the
query heads that share it, forming S^T = K Q^T and dP^T = V dO^T directly, so that no accumulator
is ever transposed: dv = P^T dO, dk = dS^T Q. No atomics, fixed order.

NaN and infinities. A weight of zero does not hide a NaN: 0 * NaN is NaN, and a tile holds several
patches. So an operand that is summed over rows enters the product with its non-finite rows zeroed,
and such a row's score becomes NaN instead, before the mask: what may see the row gets NaN, and
the mask keeps it from all others. That costs a sum over the tile's columns, which is left to these
loops: with a second copy of the loop without it the backward of 128 columns spills.

Heads of other widths than powers of two stand in the next one, masked: memory limits, not products.
Floor (bf16): 4 T H K bytes forward times two, twice that backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import (
    LOG2_E,
    NO_WINDOW,
    dot_type,
    harmless,
    put,
    row_bounds,
    tile,
    with_rows,
)
from . import config as configs
from .short_impl import stlm_patch_attention_short_bwd, stlm_patch_attention_short_fwd


@triton.jit
def _reach(bounds_ptr, base, total, BLOCK: tl.constexpr):
    """First row of the patch that each of the tile's rows belongs to, -1 if to none; and the rows
    of all these patches, counted from `base`: the first, and one past the last.
    """
    rows = base + tl.arange(0, BLOCK)
    start = tl.load(bounds_ptr + rows, mask=rows < total, other=0)
    end = tl.load(bounds_ptr + total + rows, mask=rows < total, other=0)
    live = end > start
    low = tl.min(tl.where(live, (start - base).to(tl.int32), BLOCK), 0)
    high = tl.max(tl.where(live, (end - base).to(tl.int32), 0), 0)
    return tl.where(live, start, -1), low, high


@triton.jit
def _sees(bounds_ptr, patch, rows, inside, earlier, later, IS_CAUSAL: tl.constexpr):
    """Mask of these rows that lie in the patch of each row of the tile."""
    seen = patch[:, None] == tl.load(bounds_ptr + rows, mask=inside, other=-2)[None, :]
    if IS_CAUSAL:
        seen = seen & (earlier <= later)
    return seen


@triton.jit(do_not_specialize=["total"])
def stlm_patch_attention_fwd(
    q_ptr, k_ptr, v_ptr, bounds_ptr, out_ptr, lse_ptr,
    total, q_stride, k_stride, v_stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    program, total = tl.program_id(0).to(tl.int64), total.to(tl.int64)
    head, base = program % H, program // H * BLOCK
    patch, low, high = _reach(bounds_ptr, base, total, BLOCK)
    if IS_CAUSAL:
        high = tl.minimum(high, BLOCK)
    own, live = tl.arange(0, BLOCK), patch >= 0
    rows = base + own
    q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    norm, acc = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(low, high, INNER):
        other = first + tl.arange(0, INNER)
        inside, keys = other < high, base + other
        k = tile(k_ptr, keys, inside, k_stride, head // GROUP * K, K, DOT, WIDTH)
        v = tile(v_ptr, keys, inside, v_stride, head // GROUP * K, K, DOT, WIDTH)
        seen = _sees(bounds_ptr, patch, keys, inside, other[None, :], own[:, None], IS_CAUSAL)
        v, poison = harmless(v)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") + poison[None, :]
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top) * scale  # it saw nothing yet
        p = tl.exp2(s * scale - pivot[:, None])
        shrink = tl.exp2(top * scale - pivot)
        norm = norm * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    norm = tl.where(live, norm, 1.0)
    lse = tl.where(live, top * scale + tl.log2(norm), 0.0)
    tl.store(lse_ptr + total * head + rows, lse, mask=rows < total)
    put(out_ptr, acc * (1.0 / norm)[:, None], rows, rows < total, H * K, head * K, K, WIDTH)


@triton.jit(do_not_specialize=["total"])
def stlm_patch_attention_bwd_q(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, bounds_ptr, dq_ptr, delta_ptr,
    total, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    program, total = tl.program_id(0).to(tl.int64), total.to(tl.int64)
    head, base = program % H, program // H * BLOCK
    patch, low, high = _reach(bounds_ptr, base, total, BLOCK)
    if IS_CAUSAL:
        high = tl.minimum(high, BLOCK)
    own, live = tl.arange(0, BLOCK), patch >= 0
    rows = base + own
    q = tile(q_ptr, rows, live, q_stride, head * K, K, DOT, WIDTH)
    grad = tile(grad_ptr, rows, live, H * K, head * K, K, DOT, WIDTH)
    out = tile(out_ptr, rows, live, H * K, head * K, K, tl.float32, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out, 1)
    lse = tl.load(lse_ptr + total * head + rows, mask=live, other=0.0)
    dq, mean = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    for first in range(low, high, INNER):
        other = first + tl.arange(0, INNER)
        inside, keys = other < high, base + other
        k = tile(k_ptr, keys, inside, k_stride, head // GROUP * K, K, DOT, WIDTH)
        v = tile(v_ptr, keys, inside, v_stride, head // GROUP * K, K, DOT, WIDTH)
        seen = _sees(bounds_ptr, patch, keys, inside, other[None, :], own[:, None], IS_CAUSAL)
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
    tl.store(delta_ptr + total * head + rows, delta + excess, mask=rows < total)
    put(dq_ptr, dq * unit, rows, rows < total, H * K, head * K, K, WIDTH)


@triton.jit(do_not_specialize=["total"])
def stlm_patch_attention_bwd_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, bounds_ptr, dk_ptr, dv_ptr,
    total, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    KV: tl.constexpr = H // GROUP
    program, total = tl.program_id(0).to(tl.int64), total.to(tl.int64)
    kv_head, base = program % KV, program // KV * BLOCK
    patch, low, high = _reach(bounds_ptr, base, total, BLOCK)
    if IS_CAUSAL:
        low = tl.maximum(low, 0)
    own, live = tl.arange(0, BLOCK), patch >= 0
    keys = base + own
    k = tile(k_ptr, keys, live, k_stride, kv_head * K, K, DOT, WIDTH)
    v = tile(v_ptr, keys, live, v_stride, kv_head * K, K, DOT, WIDTH)
    dk, dv = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for first in range(low, high, INNER):
            other = first + tl.arange(0, INNER)
            inside, rows = other < high, base + other
            q, poison = harmless(tile(q_ptr, rows, inside, q_stride, head * K, K, DOT, WIDTH))
            grad, more = harmless(tile(grad_ptr, rows, inside, H * K, head * K, K, DOT, WIDTH))
            lse = tl.load(lse_ptr + total * head + rows, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + total * head + rows, mask=inside, other=0.0)
            seen = _sees(bounds_ptr, patch, rows, inside, own[:, None], other[None, :], IS_CAUSAL)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(seen, tl.exp2(s + (poison + more - lse)[None, :]), 0.0)
            dv = tl.dot(p.to(DOT), grad, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
            ds = tl.where(seen, p * (dp - delta[None, :]), 0.0)
            dk = tl.dot(ds.to(DOT), q, dk, input_precision="ieee")
    put(dk_ptr, dk * unit, keys, keys < total, KV * K, kv_head * K, K, WIDTH)
    put(dv_ptr, dv, keys, keys < total, KV * K, kv_head * K, K, WIDTH)


def launch_fwd(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(T, H, K) in `out_dtype`, (H, T) fp32 log2-sum-exp2."""
    total, heads, width = q.shape
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    q, k, v, cu_patchlens = with_rows(q), with_rows(k), with_rows(v), cu_patchlens.contiguous()
    scalars = (total, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E)
    patches = cu_patchlens.shape[0] - 1
    if configs.is_short(total, patches, width):
        programs, options = _options("short_fwd", q, k, causal, out_dtype)
        _launch.launch(
            stlm_patch_attention_short_fwd, programs,
            q, k, v, cu_patchlens, out, lse, patches, *scalars,
            device=q.device, **options,
        )  # fmt: skip
        return out, lse
    programs, options = _options("fwd", q, k, causal, out_dtype)
    _launch.launch(
        stlm_patch_attention_fwd, programs,
        q, k, v, _bounds(cu_patchlens, total), out, lse, *scalars,
        device=q.device, **options,
    )  # fmt: skip
    return out, lse


def launch_bwd(
    grad: Tensor,  # (T, H, K)
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    out: Tensor,  # (T, H, K)
    lse: Tensor,  # (H, T)
    cu_patchlens: Tensor,  # (P+1,) int32
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: of short patches in one launch, of long ones in two, the second of
    which reads what the first noted of each row."""
    total, device, dtypes = q.shape[0], q.device, (q.dtype, k.dtype, v.dtype)
    q, k, v, grad = with_rows(q), with_rows(k), with_rows(v), grad.contiguous()
    out, cu_patchlens = out.contiguous(), cu_patchlens.contiguous()
    dq, dk, dv = (
        torch.empty(x.shape, dtype=dtype, device=device)
        for x, dtype in zip((q, k, v), dtypes, strict=True)
    )
    patches = cu_patchlens.shape[0] - 1
    scalars = (total, q.stride(0), k.stride(0), v.stride(0), scale * LOG2_E, scale)
    if configs.is_short(total, patches, q.shape[2]):
        programs, options = _options("short_bwd", q, k, causal, grad.dtype)
        _launch.launch(
            stlm_patch_attention_short_bwd, programs,
            q, k, v, grad, out, lse, cu_patchlens, dq, dk, dv, patches, *scalars,
            device=device, **options,
        )  # fmt: skip
        return dq, dk, dv
    delta, bounds = torch.empty_like(lse), _bounds(cu_patchlens, total)
    programs, options = _options("bwd_q", q, k, causal, grad.dtype)
    _launch.launch(
        stlm_patch_attention_bwd_q, programs,
        q, k, v, grad, out, lse, bounds, dq, delta, *scalars,
        device=device, **options,
    )  # fmt: skip
    programs, options = _options("bwd_kv", q, k, causal, grad.dtype)
    _launch.launch(
        stlm_patch_attention_bwd_kv, programs,
        q, k, v, grad, lse, delta, bounds, dk, dv, *scalars,
        device=device, **options,
    )  # fmt: skip
    return dq, dk, dv


def _bounds(cu_patchlens: Tensor, total: int) -> Tensor:
    """(2, T) int32: the patch of each row."""
    return row_bounds(cu_patchlens, total, NO_WINDOW, NO_WINDOW, cu_patchlens, total)


def _options(
    kernel: str, q: Tensor, k: Tensor, causal: bool, dtype: torch.dtype
) -> tuple[int, dict[str, Any]]:
    """Programs and constants of a launch; `dtype` is what the products' operands are cast to."""
    (total, heads, width), kv_heads = q.shape, k.shape[1]
    constants = {
        "H": heads,
        "GROUP": heads // kv_heads,
        "K": width,
        "IS_CAUSAL": causal,
        "DOT": dot_type(dtype),
        "WIDTH": configs.width_block(width),
    }
    if not kernel.startswith("short"):
        config = configs.rows_config(kernel, width, dtype, q.device)
        tiles = _launch.ceil_div(total, config["BLOCK"])
        return tiles * (kv_heads if kernel == "bwd_kv" else heads), config | constants
    config = configs.windows_config(kernel, width, total, dtype, q.device)
    divisors = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0)
    config["KV_HEADS"] = max(n for n in divisors if n <= config["KV_HEADS"])
    windows = _launch.ceil_div(total, config["WINDOW"])
    return windows * (kv_heads // config["KV_HEADS"]), config | constants
