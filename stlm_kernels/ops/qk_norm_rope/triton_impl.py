"""qk_norm_rope in Triton: one launch for q and k, forward and backward.

Rows are heads of tokens, (token, head), one after the other in memory; the first programs own the
rows of q, the others those of k, BLOCK at a time. A row's cos and sin come from the cache, since
its neighbours of the same token read the same.
Forward. One program for each block: norm, rotation, cast once.
Backward. dy is the upstream gradient turned back; with g = weight * dy and r = 1 / rms,
dx = r (g - x r^2 mean(g x)). The norm is formed again, nothing was saved. Each program walks a run
of blocks and adds up dy x r for the weights' gradients; the runs are added in order. No atomics.

A pair is two halves of a row, loaded apart, or neighbours, loaded together and split in registers,
so that either way memory is read and written in whole vectors. A table's row out of range is NaN.
Without a weight (a negative eps) r is 1 and its derivative 0: computed all the same, since memory
limits.

Floor (bf16): 4 N (H + H_kv) K bytes forward, 6 backward: 31 and 47 us at N = 32768, H = 12 + 4,
K = 64, 4.3 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import sum_splits
from . import config as configs


@triton.jit
def _pairs(x_ptr, place, live, K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """First and second of each pair of rows, (rows, WIDTH / 2) as stored; zeros where none are."""
    if IS_INTERLEAVED:
        d = tl.arange(0, WIDTH)
        mask = live[:, None] & (d < K)[None, :]
        x = tl.load(x_ptr + place[:, None] + d[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(x, (place.shape[0], WIDTH // 2, 2)))
    else:
        d = tl.arange(0, WIDTH // 2)
        mask = live[:, None] & (d < K // 2)[None, :]
        first = tl.load(x_ptr + place[:, None] + d[None, :], mask=mask, other=0.0)
        second = tl.load(x_ptr + place[:, None] + K // 2 + d[None, :], mask=mask, other=0.0)
    return first, second


@triton.jit
def _put_pairs(
    x_ptr, first, second, place, live,
    K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, second = first.to(x_ptr.dtype.element_ty), second.to(x_ptr.dtype.element_ty)
    if IS_INTERLEAVED:
        d = tl.arange(0, WIDTH)
        mask = live[:, None] & (d < K)[None, :]
        x = tl.reshape(tl.join(first, second), (place.shape[0], WIDTH))
        tl.store(x_ptr + place[:, None] + d[None, :], x, mask=mask)
    else:
        d = tl.arange(0, WIDTH // 2)
        mask = live[:, None] & (d < K // 2)[None, :]
        tl.store(x_ptr + place[:, None] + d[None, :], first, mask=mask)
        tl.store(x_ptr + place[:, None] + K // 2 + d[None, :], second, mask=mask)


@triton.jit
def _columns(K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the first and the second of each pair in a row."""
    d = tl.arange(0, WIDTH // 2)
    first = d * 2 if IS_INTERLEAVED else d
    return first, first + (1 if IS_INTERLEAVED else K // 2), d < K // 2


@triton.jit
def _angles(
    cos_ptr, sin_ptr, positions_ptr, tokens, live, period, n_positions,
    K: tl.constexpr, HAS_POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH / 2) cos and sin of each row's position in fp32."""
    positions = tokens % period
    if HAS_POSITIONS:
        positions = tl.load(positions_ptr + positions, mask=live, other=0).to(tl.int64)
    good = (positions >= 0) & (positions < n_positions)
    d = tl.arange(0, WIDTH // 2)
    mask = (live & good)[:, None] & (d < K // 2)[None, :]
    place = positions[:, None] * (K // 2) + d[None, :]
    bad = tl.where(live & ~good, float("nan"), 0.0)[:, None]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0).to(tl.float32) + bad
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0).to(tl.float32) + bad
    return cos, sin


@triton.jit
def _inverse_rms(a, b, eps, K: tl.constexpr):
    """(rows,) 1 / rms of each row; 1 without a norm."""
    mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / K
    return tl.where(eps < 0, 1.0, tl.rsqrt(mean + tl.maximum(eps, 0.0)))


@triton.jit
def _weight(w_ptr, columns, exists, eps):
    """(WIDTH / 2,) fp32; ones without a norm."""
    return tl.load(w_ptr + columns, mask=exists & (eps >= 0), other=1.0).to(tl.float32)


@triton.jit
def _forward(
    x_ptr, w_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr,
    first_row, tokens, stride, period, n_positions, eps,
    H: tl.constexpr, K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK)
    live, token = rows < tokens * H, rows // H
    place = token * stride + (rows % H) * K
    a, b = _pairs(x_ptr, place, live, K, IS_INTERLEAVED, WIDTH)
    stored = out_ptr.dtype.element_ty
    a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
    left, right, exists = _columns(K, IS_INTERLEAVED, WIDTH)
    r = _inverse_rms(a, b, eps, K)[:, None]
    a = a * r * _weight(w_ptr, left, exists, eps)[None, :]
    b = b * r * _weight(w_ptr, right, exists, eps)[None, :]
    cos, sin = _angles(
        cos_ptr, sin_ptr, positions_ptr, token, live, period, n_positions, K, HAS_POSITIONS, WIDTH
    )
    _put_pairs(
        out_ptr, a * cos - b * sin, a * sin + b * cos, rows * K, live, K, IS_INTERLEAVED, WIDTH
    )


@triton.jit(do_not_specialize=["tokens", "period", "n_positions"])
def stlm_qk_norm_rope_fwd(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr,
    tokens, q_stride, k_stride, period, n_positions, q_eps, k_eps,
    H: tl.constexpr, KV: tl.constexpr, K: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, tokens = tl.program_id(0).to(tl.int64), tokens.to(tl.int64)
    q_programs = tl.cdiv(tokens * H, BLOCK)
    if program < q_programs:
        _forward(
            q_ptr, q_weight_ptr, q_out_ptr, cos_ptr, sin_ptr, positions_ptr,
            program * BLOCK, tokens, q_stride, period, n_positions, q_eps,
            H, K, IS_INTERLEAVED, HAS_POSITIONS, WIDTH, BLOCK,
        )  # fmt: skip
    else:
        _forward(
            k_ptr, k_weight_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr,
            (program - q_programs) * BLOCK, tokens, k_stride, period, n_positions, k_eps,
            KV, K, IS_INTERLEAVED, HAS_POSITIONS, WIDTH, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward(
    grad_ptr, x_ptr, w_ptr, dx_ptr, partial_ptr, cos_ptr, sin_ptr, positions_ptr,
    first_row, run, tokens, stride, period, n_positions, eps,
    H: tl.constexpr, K: tl.constexpr, IS_INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    left, right, exists = _columns(K, IS_INTERLEAVED, WIDTH)
    w_a = _weight(w_ptr, left, exists, eps)[None, :]
    w_b = _weight(w_ptr, right, exists, eps)[None, :]
    sum_a = tl.zeros((BLOCK, WIDTH // 2), tl.float32)
    sum_b = tl.zeros((BLOCK, WIDTH // 2), tl.float32)
    stored = grad_ptr.dtype.element_ty
    for first in range(first_row, tl.minimum(first_row + run, tokens * H), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        live, token = rows < tokens * H, rows // H
        place = token * stride + (rows % H) * K
        a, b = _pairs(x_ptr, place, live, K, IS_INTERLEAVED, WIDTH)
        a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
        up_a, up_b = _pairs(grad_ptr, rows * K, live, K, IS_INTERLEAVED, WIDTH)
        up_a, up_b = up_a.to(tl.float32), up_b.to(tl.float32)
        cos, sin = _angles(
            cos_ptr, sin_ptr, positions_ptr, token, live, period, n_positions,
            K, HAS_POSITIONS, WIDTH,
        )  # fmt: skip
        dy_a, dy_b = up_a * cos + up_b * sin, up_b * cos - up_a * sin
        r = _inverse_rms(a, b, eps, K)[:, None]
        sum_a += dy_a * a * r
        sum_b += dy_b * b * r
        g_a, g_b = dy_a * w_a, dy_b * w_b
        mean = (tl.sum(g_a * a, 1) + tl.sum(g_b * b, 1)) / K
        pull = tl.where(eps < 0, 0.0, mean)[:, None] * r * r
        _put_pairs(
            dx_ptr, r * (g_a - a * pull), r * (g_b - b * pull), rows * K, live,
            K, IS_INTERLEAVED, WIDTH,
        )  # fmt: skip
    tl.store(partial_ptr + left, tl.sum(sum_a, 0), mask=exists)
    tl.store(partial_ptr + right, tl.sum(sum_b, 0), mask=exists)


@triton.jit(do_not_specialize=["tokens", "period", "n_positions", "run"])
def stlm_qk_norm_rope_bwd(
    q_grad_ptr, k_grad_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, partial_ptr,
    cos_ptr, sin_ptr, positions_ptr,
    tokens, run, q_stride, k_stride, period, n_positions, q_eps, k_eps,
    H: tl.constexpr, KV: tl.constexpr, K: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, tokens = tl.program_id(0).to(tl.int64), tokens.to(tl.int64)
    q_programs = tl.cdiv(tokens * H, run)
    if program < q_programs:
        _backward(
            q_grad_ptr, q_ptr, q_weight_ptr, dq_ptr, partial_ptr + program * K,
            cos_ptr, sin_ptr, positions_ptr,
            program * run, run, tokens, q_stride, period, n_positions, q_eps,
            H, K, IS_INTERLEAVED, HAS_POSITIONS, WIDTH, BLOCK,
        )  # fmt: skip
    else:
        _backward(
            k_grad_ptr, k_ptr, k_weight_ptr, dk_ptr, partial_ptr + program * K,
            cos_ptr, sin_ptr, positions_ptr,
            (program - q_programs) * run, run, tokens, k_stride, period, n_positions, k_eps,
            KV, K, IS_INTERLEAVED, HAS_POSITIONS, WIDTH, BLOCK,
        )  # fmt: skip


def launch_fwd(
    q: Tensor,  # (N, H, K)
    k: Tensor,  # (N, H_kv, K)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    q_weight: Tensor | None,  # (K,)
    k_weight: Tensor | None,  # (K,)
    positions: Tensor | None,  # (period,)
    period: int,
    eps: float,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both in `out_dtype`."""
    tokens, heads, width = q.shape
    q, k = _with_rows(q), _with_rows(k)
    q_out, k_out = (torch.empty(x.shape, dtype=out_dtype, device=x.device) for x in (q, k))
    rows = tokens * (heads + k.shape[1])
    config = configs.rows_config("fwd", rows, width, q.dtype, q.device)
    blocks = [_launch.ceil_div(tokens * x.shape[1], config["BLOCK"]) for x in (q, k)]
    _launch.launch(
        stlm_qk_norm_rope_fwd, sum(blocks),
        q, k, *_weights(q_weight, k_weight, cos), q_out, k_out, *_tables(cos, sin, positions),
        tokens, q.stride(0), k.stride(0), max(1, period), cos.shape[0],
        *(-1.0 if w is None else eps for w in (q_weight, k_weight)),
        **_constants(q, k, positions, interleaved), device=q.device, **config,
    )  # fmt: skip
    return q_out, k_out


def launch_bwd(
    grad_q: Tensor,  # (N, H, K)
    grad_k: Tensor,  # (N, H_kv, K)
    q: Tensor,  # (N, H, K)
    k: Tensor,  # (N, H_kv, K)
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor | None,
    period: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and the weights; empty for a weight that is not there."""
    tokens, heads, width = q.shape
    q, k = _with_rows(q), _with_rows(k)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows = tokens * (heads + k.shape[1])
    config = configs.rows_config("bwd", rows, width, q.dtype, q.device)
    _, run = _launch.splits(rows, 1, config.pop("PROGRAMS"), config["BLOCK"])
    programs = [_launch.ceil_div(tokens * x.shape[1], run) for x in (q, k)]
    partial = torch.empty((sum(programs), width), dtype=torch.float32, device=q.device)
    _launch.launch(
        stlm_qk_norm_rope_bwd, sum(programs),
        grad_q.contiguous(), grad_k.contiguous(), q, k, *_weights(q_weight, k_weight, cos),
        dq, dk, partial, *_tables(cos, sin, positions),
        tokens, run, q.stride(0), k.stride(0), max(1, period), cos.shape[0],
        *(-1.0 if w is None else eps for w in (q_weight, k_weight)),
        **_constants(q, k, positions, interleaved), device=q.device, **config,
    )  # fmt: skip
    parts = zip(partial.split(programs), (q_weight, k_weight), strict=True)
    sums = (q.new_empty(0) if w is None else sum_splits(part, w.dtype) for part, w in parts)
    return dq, dk, *sums


def _with_rows(x: Tensor) -> Tensor:
    """Slices of packed projections are read where they lie; other layouts are copied."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if dense else x.contiguous()


def _weights(q_weight: Tensor | None, k_weight: Tensor | None, unread: Tensor) -> list[Tensor]:
    return [unread if w is None else w.contiguous() for w in (q_weight, k_weight)]


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None) -> list[Tensor]:
    return [x.contiguous() for x in (cos, sin, cos if positions is None else positions)]


def _constants(
    q: Tensor, k: Tensor, positions: Tensor | None, interleaved: bool
) -> dict[str, object]:
    _, heads, width = q.shape
    return {
        "H": heads,
        "KV": k.shape[1],
        "K": width,
        "IS_INTERLEAVED": interleaved,
        "HAS_POSITIONS": positions is not None,
        "WIDTH": configs.width_block(width),
    }
