"""qk_norm_rope in Triton: one launch for q and k, forward and backward.

Rows are heads of tokens, (token, head), one after the other in memory; the first programs own the
rows of q, the others those of k, BLOCK at a time. A row's cos and sin come from the cache, since
its neighbours of the same token read the same.
Forward. One program for each block: norm, rotation, cast once.
Backward. dy is the upstream gradient turned back; with g = weight * dy and r = 1 / rms,
dx = r (g - x r^2 mean(g x)). The norm is formed again, nothing was saved. Each program walks a run
of blocks and adds up dy x r for the weights' gradients; the runs are added in order. No atomics.

A table's row out of range is NaN. Without a weight (a negative eps) r is 1 and its derivative 0:
computed all the same, since memory limits.

Floor (bf16): 4 N (H + H_kv) K bytes forward, 6 backward: 31 and 47 us at N = 32768, H = 12 + 4,
K = 64, 4.3 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.rotary import (
    angles_of,
    load_pairs,
    norm_gradients,
    norm_weights,
    normed_and_turned,
    pair_columns,
    store_pairs,
    turned_back,
)
from ..._triton.tiles import sum_of_norms
from . import config as configs


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
    a, b = load_pairs(x_ptr, place, live, K, IS_INTERLEAVED, WIDTH)
    stored = out_ptr.dtype.element_ty
    a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
    left, right, exists = pair_columns(K, IS_INTERLEAVED, WIDTH)
    w_a = norm_weights(w_ptr, left, exists, eps)[None, :]
    w_b = norm_weights(w_ptr, right, exists, eps)[None, :]
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, token, live, period, n_positions, K, HAS_POSITIONS, WIDTH
    )
    a, b = normed_and_turned(a, b, w_a, w_b, cos, sin, eps, K)
    store_pairs(out_ptr, a, b, rows * K, live, K, IS_INTERLEAVED, WIDTH)


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
    left, right, exists = pair_columns(K, IS_INTERLEAVED, WIDTH)
    w_a = norm_weights(w_ptr, left, exists, eps)[None, :]
    w_b = norm_weights(w_ptr, right, exists, eps)[None, :]
    sum_a = tl.zeros((BLOCK, WIDTH // 2), tl.float32)
    sum_b = tl.zeros((BLOCK, WIDTH // 2), tl.float32)
    stored = grad_ptr.dtype.element_ty
    for first in range(first_row, tl.minimum(first_row + run, tokens * H), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        live, token = rows < tokens * H, rows // H
        place = token * stride + (rows % H) * K
        a, b = load_pairs(x_ptr, place, live, K, IS_INTERLEAVED, WIDTH)
        a, b = a.to(stored).to(tl.float32), b.to(stored).to(tl.float32)
        up_a, up_b = load_pairs(grad_ptr, rows * K, live, K, IS_INTERLEAVED, WIDTH)
        up_a, up_b = up_a.to(tl.float32), up_b.to(tl.float32)
        cos, sin = angles_of(
            cos_ptr, sin_ptr, positions_ptr, token, live, period, n_positions,
            K, HAS_POSITIONS, WIDTH,
        )  # fmt: skip
        dy_a, dy_b = turned_back(up_a, up_b, cos, sin)
        dx_a, dx_b, along_a, along_b = norm_gradients(dy_a, dy_b, a, b, w_a, w_b, eps, K)
        sum_a += along_a
        sum_b += along_b
        store_pairs(dx_ptr, dx_a, dx_b, rows * K, live, K, IS_INTERLEAVED, WIDTH)
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
    return dq, dk, *sum_of_norms(partial.split(programs), (q_weight, k_weight), q.dtype)


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
