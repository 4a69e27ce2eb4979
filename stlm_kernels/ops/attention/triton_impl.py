"""attention in Triton: causal, within a window and a document, query heads sharing key heads.

A tile is BLOCK rows: the query heads that share a key head (`PACK` of them), each at the same
positions, so that keys and values are read once for all. Where a row starts to see, and where it
ends, are plain numbers: those of its sequence cut to the window, or, with documents, two int32 a
row that one pass notes beforehand; they rise with the rows, so that the first and the last row say
what the tile sees in all, without a sum over its rows. Heads of 48 are 32 + 16 columns, in two
products each.
Forward. A program owns a tile and walks the range of keys that any row of it sees, INNER at a time,
carrying the softmax (base 2, the scale folded into the exponent, fp32). Blocks that every row sees
whole have no mask; at the others each side that cuts costs a compare and a select an element. Long
rows start first, so that short ones fill the device's last moments.
Backward. From the saved log-sum-exp the weights are formed again. One kernel owns a tile of queries
and adds up dq = dS K; it also stores delta = rowsum(dO * out), which a tile whose rows see few keys
forms from the products instead: `out` is rounded, and there that does not average away. The other
owns BLOCK keys of one key head and walks the query heads that share it, PACK of them side by side,
forming S^T = K Q^T and dP^T = V dO^T directly, so that no accumulator is ever transposed:
dv = P^T dO, dk = dS^T Q. No atomics, fixed order, work in proportion to T x window.

NaN and infinities. A weight of zero does not hide a NaN. The loops take no care of that; a program
looks once whether its sums are finite, and if not forms them again: in blocks that not every row
sees, rows of an operand that is summed over enter the product as zeros where they are not finite,
and the scores of such a row become NaN instead, before the mask: what may see it gets NaN, nothing
else does. Results are stored as they are where all is finite, whatever the other tiles hold.

Floor (bf16, H200, 790 TFLOP/s, 4.3 TB/s, 4e12 exp/s): per score 4 K FLOPs and an exp2 forward,
14 K and two exp2 backward; below K = 50 the exp2 lasts longer than the products. B24 T512 16/4
heads K32: 50 M scores, 13 us forward, 29 us backward. 8 x 8192, H8 K64, window 128: 63 and 126 us
of memory traffic.
Counted (sm_90, bench/RESULTS.md): B24 T512 at least 20.5 us forward and 40.9 us backward, by
instructions; 8 x 8192 with window 256 93.8 and 251.2 us, by bytes from L2. The aims were 21, 40,
98 and 235: both backward kernels read the 383 rows that 128 meet, and larger tiles do not fit.
Of a forward block of 64 keys two thirds of the instructions are arithmetic of its scores, the rest
waits and descriptors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.attention_loops import exact_delta, key_gradients, query_gradient, softmax
from ..._triton.heads import added, inner, is_finite, load_live_rows, scaled, store_rows
from ..._triton.sight import sight
from ..._triton.tiles import LOG2_E, dot_type, row_bounds, with_rows
from . import config as configs

SHORT = 32
"""Rows of sequences that tiles of one would leave mostly empty."""


@triton.jit(do_not_specialize=["total", "length", "other", "before", "behind"])
def stlm_attention_fwd(
    q_ptr, k_ptr, v_ptr, bounds_ptr, out_ptr, lse_ptr,
    total, length, other, before, behind, q_stride, k_stride, v_stride, scale, lowest,
    H: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HAS_DOCS: tl.constexpr,
    DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    ROWS: tl.constexpr = BLOCK // PACK
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % (H // PACK) * PACK
    base, count, there, first, last, high, all_first, all_last = sight(
        bounds_ptr, program // (H // PACK), length, other, before, behind, HAS_DOCS, ROWS, BLOCK
    )
    own = tl.arange(0, BLOCK) % ROWS
    heads = head + tl.arange(0, BLOCK) // ROWS
    rows = base + own
    inside, live = own < count, (own < count) & (last > first)
    q_at = own.to(tl.int64) * q_stride + heads * K
    q = load_live_rows(q_ptr + base * q_stride, q_at, live, DOT, MAIN, REST)
    k_ptr += there * k_stride + head // GROUP * K
    v_ptr += there * v_stride + head // GROUP * K
    top, norm, acc = softmax(
        q, k_ptr, v_ptr, k_stride, v_stride, scale, lowest, first, last, high, all_first, all_last,
        DOT, MAIN, REST, BLOCK, INNER, False,
    )  # fmt: skip
    if not is_finite(acc):
        top, norm, acc = softmax(
            q, k_ptr, v_ptr, k_stride, v_stride, scale, lowest, first, last, high, all_first,
            all_last,
            DOT, MAIN, REST, BLOCK, INNER, True,
        )  # fmt: skip
    norm = tl.where(live, norm, 1.0)
    lse = tl.where(live, top * scale + tl.log2(norm), 0.0)
    tl.store(lse_ptr + heads.to(tl.int64) * total + rows, lse, mask=inside)
    acc = scaled(acc, 1.0 / norm)
    store_rows(out_ptr + base * (H * K), acc, own * (H * K) + heads * K, inside, MAIN, REST)


@triton.jit(do_not_specialize=["total", "length", "other", "before", "behind"])
def stlm_attention_bwd_q(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, bounds_ptr, dq_ptr, delta_ptr,
    total, length, other, before, behind, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HAS_DOCS: tl.constexpr,
    DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    ROWS: tl.constexpr = BLOCK // PACK
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % (H // PACK) * PACK
    base, count, there, first, last, high, all_first, all_last = sight(
        bounds_ptr, program // (H // PACK), length, other, before, behind, HAS_DOCS, ROWS, BLOCK
    )
    own = tl.arange(0, BLOCK) % ROWS
    heads = head + tl.arange(0, BLOCK) // ROWS
    rows = base + own
    inside, live = own < count, (own < count) & (last > first)
    at, noted = own * (H * K) + heads * K, heads.to(tl.int64) * total + rows
    q_at = own.to(tl.int64) * q_stride + heads * K
    q = load_live_rows(q_ptr + base * q_stride, q_at, live, DOT, MAIN, REST)
    grad = load_live_rows(grad_ptr + base * (H * K), at, live, DOT, MAIN, REST)
    lse = tl.load(lse_ptr + noted, mask=live, other=0.0)
    k_ptr += there * k_stride + head // GROUP * K
    v_ptr += there * v_stride + head // GROUP * K
    few = False
    if out_ptr.dtype.element_ty != tl.float32:
        # So few keys that the rounding of `out` does not average away.
        if HAS_DOCS:
            few = tl.min(tl.where(live, last - first, 64), 0) < 64
        else:
            few = tl.minimum(all_last, high - all_first) < 64
    if few:
        delta = exact_delta(
            q, grad, k_ptr, v_ptr, k_stride, v_stride, scale, lse, first, last, high,
            DOT, MAIN, REST, BLOCK, INNER,
        )  # fmt: skip
    else:
        out = load_live_rows(out_ptr + base * (H * K), at, live, tl.float32, MAIN, REST)
        delta = inner(grad, out)
    tl.store(delta_ptr + noted, tl.where(live, delta, 0.0), mask=inside)
    dq = query_gradient(
        q, grad, k_ptr, v_ptr, k_stride, v_stride, scale, lse, delta, first, last, high,
        all_first, all_last, DOT, MAIN, REST, BLOCK, INNER, False,
    )  # fmt: skip
    if not is_finite(dq):
        dq = query_gradient(
            q, grad, k_ptr, v_ptr, k_stride, v_stride, scale, lse, delta, first, last, high,
            all_first, all_last, DOT, MAIN, REST, BLOCK, INNER, True,
        )  # fmt: skip
    dq = scaled(dq, tl.zeros((BLOCK,), tl.float32) + unit)
    store_rows(dq_ptr + base * (H * K), dq, at, inside, MAIN, REST)


@triton.jit(do_not_specialize=["total", "length", "other", "before", "behind"])
def stlm_attention_bwd_kv(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, bounds_ptr, dk_ptr, dv_ptr,
    total, length, other, before, behind, q_stride, k_stride, v_stride, scale, unit,
    H: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HAS_DOCS: tl.constexpr,
    DOT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = MAIN + REST
    KV: tl.constexpr = H // GROUP
    program = tl.program_id(0)
    head = program % KV
    base, count, there, first, last, high, all_first, all_last = sight(
        bounds_ptr, program // KV, length, other, before, behind, HAS_DOCS, BLOCK, BLOCK
    )
    own = tl.arange(0, BLOCK)
    inside, live = own < count, (own < count) & (last > first)
    keys = own.to(tl.int64)
    k_ptr += base * k_stride + head * K
    v_ptr += base * v_stride + head * K
    k = load_live_rows(k_ptr, keys * k_stride, live, DOT, MAIN, REST)
    v = load_live_rows(v_ptr, keys * v_stride, live, DOT, MAIN, REST)
    q_ptr += there * q_stride + head * (GROUP * K)
    grad_ptr += there * (H * K) + head * (GROUP * K)
    noted = (head * GROUP).to(tl.int64) * total + there
    dk, dv = key_gradients(
        k, v, q_ptr, grad_ptr, lse_ptr + noted, delta_ptr + noted, q_stride, H * K, total, scale,
        first, last, high, all_first, all_last, GROUP, PACK, DOT, MAIN, REST, BLOCK, INNER, False,
    )  # fmt: skip
    if not is_finite(added(dk, dv)):
        dk, dv = key_gradients(
            k, v, q_ptr, grad_ptr, lse_ptr + noted, delta_ptr + noted, q_stride, H * K, total,
            scale, first, last, high, all_first, all_last, GROUP, PACK, DOT, MAIN, REST, BLOCK,
            INNER, True,
        )  # fmt: skip
    dk = scaled(dk, tl.zeros((BLOCK,), tl.float32) + unit)
    noted = base * (KV * K) + head * K
    store_rows(dk_ptr + noted, dk, own * (KV * K), inside, MAIN, REST)
    store_rows(dv_ptr + noted, dv, own * (KV * K), inside, MAIN, REST)


def launch_fwd(
    q: Tensor,  # (B, T, H, K) or (T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K) or (T_kv, H_kv, K)
    v: Tensor,  # as k
    cu_seqlens: Tensor | None,  # (S+1,) int32, of packed rows
    cu_seqlens_k: Tensor | None,  # (S+1,) int32; None: cu_seqlens
    left: int | None,
    right: int | None,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output as q in `out_dtype`, (H, B T) fp32 log2-sum-exp2, int32 bounds of each row."""
    heads, device, sides = q.shape[-2], q.device, _sides(left, right)
    batch, length, keys, cu = _stream(q, k, cu_seqlens)
    total = batch * length
    kept = cu is cu_seqlens  # and else made again by the backward
    mirror = kept and cu_seqlens_k is None
    bounds = _bounds(cu, cu_seqlens_k, length, keys, sides, device, mirror)
    out = torch.empty(q.shape, dtype=out_dtype, device=device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=device)
    options = _options("fwd", q, k, cu is not None, sides, out_dtype)
    programs = _programs(batch, length, heads, options)
    q, k, v = _rows(q), _rows(k), _rows(v)
    factor = _base_2(scale)
    lowest = -torch.finfo(torch.float32).max / max(factor, 1.0)  # finite even times the factor
    _launch.launch(
        stlm_attention_fwd, programs,
        q, k, v, bounds, out, lse,
        total, length, keys, *sides, q.stride(0), k.stride(0), v.stride(0), factor, lowest,
        device=device, **options,
    )  # fmt: skip
    return out, lse, bounds if kept else bounds.new_empty((2, 0))


def launch_bwd(
    grad: Tensor,  # as q
    q: Tensor,  # (B, T, H, K) or (T, H, K)
    k: Tensor,  # (B, T_kv, H_kv, K) or (T_kv, H_kv, K)
    v: Tensor,  # as k
    out: Tensor,  # as q
    lse: Tensor,  # (H, B T)
    bounds: Tensor,  # (4, T) of q and k; (2, T) with cu_seqlens_k; (2, 0) without documents
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the second kernel reads what the first noted of each row."""
    heads, kv_heads, device, sides = q.shape[-2], k.shape[-2], q.device, _sides(left, right)
    batch, length, keys, cu = _stream(q, k, cu_seqlens)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    has_docs = cu is not None
    of_q, of_kv = (_options(x, q, k, has_docs, sides, grad.dtype) for x in ("bwd_q", "bwd_kv"))
    if cu is not cu_seqlens:
        bounds = _bounds(cu, None, length, keys, sides, device, mirror=True)
    if cu_seqlens_k is None:
        key_bounds = bounds[2:]
    else:
        key_bounds = _bounds(cu_seqlens_k, cu, keys, length, sides[::-1], device)
    total, delta = lse.shape[1], torch.empty_like(lse)
    q, k, v = _rows(q), _rows(k), _rows(v)
    grad, out = grad.contiguous(), out.contiguous()
    last = q.stride(0), k.stride(0), v.stride(0), _base_2(scale), scale
    _launch.launch(
        stlm_attention_bwd_q, _programs(batch, length, heads, of_q),
        q, k, v, grad, out, lse, bounds, dq, delta,
        total, length, keys, *sides, *last, device=device, **of_q,
    )  # fmt: skip
    programs = _programs(batch, keys, kv_heads, of_kv | {"PACK": 1})
    _launch.launch(
        stlm_attention_bwd_kv, programs,
        q, k, v, grad, lse, delta, key_bounds, dk, dv,
        total, keys, length, *sides[::-1], *last, device=device, **of_kv,
    )  # fmt: skip
    return dq, dk, dv


def _stream(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, Tensor | None]:
    """Number of sequences, their rows and keys, and boundaries. Sequences so short that a tile
    holds several are documents of one."""
    batch, length, keys = 1 if q.dim() == 3 else q.shape[0], q.shape[-3], k.shape[-3]
    total = batch * length
    if batch == 1 or not 0 < length == keys <= SHORT or total > configs.FARTHEST:
        return batch, length, keys, cu_seqlens
    cu = torch.arange(0, total + 1, length, dtype=torch.int32, device=q.device)
    return 1, total, total, cu


def _rows(x: Tensor) -> Tensor:
    """(B T, H, K) with dense rows."""
    return with_rows(x if x.dim() == 3 else x.flatten(0, 1))


def _base_2(scale: float) -> float:
    """A factor for powers of two, which float32 does not take for zero."""
    return max(scale * LOG2_E, torch.finfo(torch.float32).tiny)


def _programs(batch: int, rows: int, heads: int, options: dict[str, Any]) -> int:
    """Tiles of all sequences, for each group of heads that share them."""
    positions = options["BLOCK"] // options["PACK"]
    return batch * _launch.ceil_div(rows, positions) * (heads // options["PACK"])


def _sides(left: int | None, right: int | None) -> tuple[int, int]:
    most = configs.FARTHEST
    left, right = (most if x is None else min(x, most) for x in (left, right))
    return left, right


def _bounds(
    cu: Tensor | None, other: Tensor | None, rows: int, others: int, sides: tuple[int, int],
    device: torch.device, mirror: bool = False,
) -> Tensor:  # fmt: skip
    """Range of the other side's rows that each row of packed documents meets: see `row_bounds`."""
    if cu is None:
        return torch.empty((2, 0), dtype=torch.int32, device=device)
    return row_bounds(cu, rows, *sides, cu if other is None else other, others, mirror=mirror)


def _options(
    kernel: str, q: Tensor, k: Tensor, has_docs: bool, sides: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    """The constants of a launch; `dtype` is what the products' operands are cast to."""
    (heads, width), reach = q.shape[-2:], min(sum(sides) + 1, k.shape[-3])
    options = configs.rows_config(kernel, width, reach, dtype, q.dtype, q.device) | {
        "H": heads,
        "GROUP": heads // k.shape[-2],
        "HAS_DOCS": has_docs,
        "DOT": dot_type(dtype),
        "MAIN": configs.main_columns(width),
        "REST": width - configs.main_columns(width),
    }
    rows = options["INNER" if kernel == "bwd_kv" else "BLOCK"]
    options["PACK"] = configs.heads_of_a_tile(options["GROUP"], rows)
    return options
