"""qkv_rope in Triton: one launch forward; backward one for all heads, two products, one for x.

Forward. A program owns BLOCK rows and some heads: it normalises its rows once (where BLOCK_D covers
D; else again for each head, BLOCK_D columns at a time), and for each head forms the product, in
fp32, and norm and rotation of it, stored once. Rows of the weight are read in the order of pairs,
first and second side by side, so that a pair of columns of the product lies in one thread.
Backward. `bwd` forms the product of normed heads again and stores the gradient of all products in
x's dtype, each row over its rms: so torch's product with x itself is the weight's gradient, and
that with the weight goes through the norm in `bwd_norm`. Gradients of norm weights are partial
sums of programs, added in order. No atomics.

Floor at T = 65,536, D = 256, 4 + 4 + 4 heads of 64: 25.8 GFLOP = 33 us at 790 TFLOP/s and 134 MB =
31 us at 4.3 TB/s forward; backward two products, 65 us, 168 MB. Counted on sm_90: 65 us forward,
of L2, since each block of 128 rows reads the whole weight (issue 21, matrix 26); 151 backward, of
which torch's products 56. A weight gradient of our own would cost 22 us of products for 133 MB less
(31 us) and read x for each group of heads: no gain. Predicted where x is returned: `bwd_norm` reads
34 MB more (7 us) in place of a sum of its own (101 MB, 21 us). The product for x within `bwd_norm`
would save 67 MB and read the weight from L2 for each block: 67 us, not 49.
"""

from __future__ import annotations

from typing import Any

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
from ..._triton.tiles import dot_type, put, sum_of_norms, sum_splits
from . import config as configs


@triton.jit
def _rows_of_x(x_ptr, rows, live, stride, first, D: tl.constexpr, STORED, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) fp32 from column `first` on, as STORED holds them; zeros elsewhere."""
    d = first + tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)
    return x.to(STORED).to(tl.float32)


@triton.jit
def _scaled(x, r, gain_ptr, first, D: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows after their norm, an operand of products."""
    x = x * r[:, None]
    if gain_ptr is not None:
        d = first + tl.arange(0, BLOCK_D)
        x *= tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return x.to(DOT)


@triton.jit
def _normed(
    x_ptr, gain_ptr, rows, live, stride, eps,
    D: tl.constexpr, STORED, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns of rows after their norm, the first BLOCK_D, and one over the rms."""
    x = _rows_of_x(x_ptr, rows, live, stride, 0, D, STORED, BLOCK_D)
    squares = tl.sum(x * x, 1)
    for first in range(BLOCK_D, D, BLOCK_D):
        more = _rows_of_x(x_ptr, rows, live, stride, first, D, STORED, BLOCK_D)
        squares += tl.sum(more * more, 1)
    r = tl.rsqrt(squares / D + eps)
    return _scaled(x, r, gain_ptr, 0, D, DOT, BLOCK_D), r


@triton.jit
def _product(
    normed, r, x_ptr, gain_ptr, w_ptr, rows, live, stride, w_rows, exists,
    D: tl.constexpr, STORED, DOT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(rows, w_rows) fp32 products with rows of the weight."""
    d = tl.arange(0, BLOCK_D)
    place = w_ptr + w_rows[:, None] * D + d[None, :]
    w = tl.load(place, mask=exists[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    acc = tl.dot(normed, tl.trans(w), input_precision="ieee")
    for first in range(BLOCK_D, D, BLOCK_D):
        x = _rows_of_x(x_ptr, rows, live, stride, first, D, STORED, BLOCK_D)
        x = _scaled(x, r, gain_ptr, first, D, DOT, BLOCK_D)
        mask = exists[:, None] & (first + d < D)[None, :]
        w = tl.load(place + first, mask=mask, other=0.0).to(DOT)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _pair_rows(K: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a head's weight in the order of pairs, and which exist."""
    c = tl.arange(0, WIDTH)
    return (c % 2) * (K // 2) + c // 2, c // 2 < K // 2


@triton.jit
def _pairs(product, WIDTH: tl.constexpr):
    return tl.split(tl.reshape(product, (product.shape[0], WIDTH // 2, 2)))


@triton.jit(do_not_specialize=["tokens", "period", "n_positions"])
def stlm_qkv_rope_fwd(
    x_ptr, gain_ptr, w_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr,
    cos_ptr, sin_ptr, positions_ptr, tokens, stride, period, n_positions, eps, q_eps, k_eps,
    D: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, DOT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    STORED = q_ptr.dtype.element_ty
    groups: tl.constexpr = (H + 2 * KV + HEADS - 1) // HEADS
    program, tokens = tl.program_id(0).to(tl.int64), tokens.to(tl.int64)
    low = (program % groups).to(tl.int32) * HEADS
    high = low + HEADS
    rows = (program // groups) * BLOCK + tl.arange(0, BLOCK)
    live = rows < tokens
    normed, r = _normed(x_ptr, gain_ptr, rows, live, stride, eps, D, STORED, DOT, BLOCK_D)
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, rows, live, period, n_positions, K, HAS_POSITIONS, WIDTH
    )
    w_rows, exists = _pair_rows(K, WIDTH)
    left, right, own = pair_columns(K, False, WIDTH)
    w_a = norm_weights(q_weight_ptr, left, own, q_eps)[None, :]
    w_b = norm_weights(q_weight_ptr, right, own, q_eps)[None, :]
    for head in range(low, tl.minimum(high, H)):
        product = _product(
            normed, r, x_ptr, gain_ptr, w_ptr, rows, live, stride, head * K + w_rows, exists,
            D, STORED, DOT, BLOCK_D,
        )  # fmt: skip
        a, b = _pairs(product, WIDTH)
        a, b = normed_and_turned(a, b, w_a, w_b, cos, sin, q_eps, K)
        store_pairs(q_ptr, a, b, (rows * H + head) * K, live, K, False, WIDTH)
    w_a = norm_weights(k_weight_ptr, left, own, k_eps)[None, :]
    w_b = norm_weights(k_weight_ptr, right, own, k_eps)[None, :]
    for head in range(tl.maximum(low, H), tl.minimum(high, H + KV)):
        product = _product(
            normed, r, x_ptr, gain_ptr, w_ptr, rows, live, stride, head * K + w_rows, exists,
            D, STORED, DOT, BLOCK_D,
        )  # fmt: skip
        a, b = _pairs(product, WIDTH)
        a, b = normed_and_turned(a, b, w_a, w_b, cos, sin, k_eps, K)
        store_pairs(k_ptr, a, b, (rows * KV + head - H) * K, live, K, False, WIDTH)
    c = tl.arange(0, WIDTH)
    for head in range(tl.maximum(low, H + KV), tl.minimum(high, H + 2 * KV)):
        product = _product(
            normed, r, x_ptr, gain_ptr, w_ptr, rows, live, stride, head * K + c, c < K,
            D, STORED, DOT, BLOCK_D,
        )  # fmt: skip
        put(v_ptr, product, rows * KV + head - H - KV, live, K, 0, K, WIDTH)


@triton.jit
def _head_gradient(
    normed, r, x_ptr, gain_ptr, w_ptr, weight_ptr, up_ptr, dp_ptr, partial_ptr,
    rows, live, stride, head, first_head, up_heads, span, cos, sin, eps,
    D: tl.constexpr, K: tl.constexpr, PITCH: tl.constexpr, DOT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one head's product, and of its norm's weight where there is one."""
    STORED = dp_ptr.dtype.element_ty
    up = (rows * up_heads + head - first_head) * K
    a, b = load_pairs(up_ptr, up, live, K, False, WIDTH)
    a, b = turned_back(a.to(tl.float32), b.to(tl.float32), cos, sin)
    if weight_ptr is not None:
        w_rows, exists = _pair_rows(K, WIDTH)
        product = _product(
            normed, r, x_ptr, gain_ptr, w_ptr, rows, live, stride, head * K + w_rows, exists,
            D, STORED, DOT, BLOCK_D,
        )  # fmt: skip
        left, right, own = pair_columns(K, False, WIDTH)
        w_a = norm_weights(weight_ptr, left, own, eps)[None, :]
        w_b = norm_weights(weight_ptr, right, own, eps)[None, :]
        p_a, p_b = _pairs(product, WIDTH)
        a, b, along_a, along_b = norm_gradients(a, b, p_a, p_b, w_a, w_b, eps, K)
        tl.store(partial_ptr + head * span + left, tl.sum(along_a, 0), mask=own)
        tl.store(partial_ptr + head * span + right, tl.sum(along_b, 0), mask=own)
    scale = r[:, None]
    store_pairs(dp_ptr, a * scale, b * scale, rows * PITCH + head * K, live, K, False, WIDTH)


@triton.jit(do_not_specialize=["tokens", "period", "n_positions"])
def stlm_qkv_rope_bwd(
    x_ptr, gain_ptr, w_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, dv_ptr, dp_ptr,
    partial_ptr, cos_ptr, sin_ptr, positions_ptr, tokens, stride, period, n_positions, eps,
    D: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, K: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, DOT: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums are (H + H_kv, blocks, K), where there are weights of heads."""
    STORED = dp_ptr.dtype.element_ty
    PITCH: tl.constexpr = (H + 2 * KV) * K
    groups: tl.constexpr = (H + 2 * KV + HEADS - 1) // HEADS
    program, tokens = tl.program_id(0).to(tl.int64), tokens.to(tl.int64)
    low, block = (program % groups).to(tl.int32) * HEADS, program // groups
    high = low + HEADS
    rows = block * BLOCK + tl.arange(0, BLOCK)
    live = rows < tokens
    normed, r = _normed(x_ptr, gain_ptr, rows, live, stride, eps, D, STORED, DOT, BLOCK_D)
    cos, sin = angles_of(
        cos_ptr, sin_ptr, positions_ptr, rows, live, period, n_positions, K, HAS_POSITIONS, WIDTH
    )
    partial_ptr += block * K
    span = tl.cdiv(tokens, BLOCK) * K
    for head in range(low, tl.minimum(high, H)):
        _head_gradient(
            normed, r, x_ptr, gain_ptr, w_ptr, q_weight_ptr, dq_ptr, dp_ptr, partial_ptr,
            rows, live, stride, head, 0, H, span, cos, sin, eps, D, K, PITCH, DOT, WIDTH, BLOCK_D,
        )  # fmt: skip
    for head in range(tl.maximum(low, H), tl.minimum(high, H + KV)):
        _head_gradient(
            normed, r, x_ptr, gain_ptr, w_ptr, k_weight_ptr, dk_ptr, dp_ptr, partial_ptr,
            rows, live, stride, head, H, KV, span, cos, sin, eps, D, K, PITCH, DOT, WIDTH, BLOCK_D,
        )  # fmt: skip
    c = tl.arange(0, WIDTH)
    for head in range(tl.maximum(low, H + KV), tl.minimum(high, H + 2 * KV)):
        place = (rows * KV + head - H - KV)[:, None] * K + c[None, :]
        up = tl.load(dv_ptr + place, mask=live[:, None] & (c < K)[None, :], other=0.0)
        up = up.to(tl.float32) * r[:, None]
        put(dp_ptr + head * K, up, rows, live, PITCH, 0, K, WIDTH)


@triton.jit(do_not_specialize=["tokens", "run"])
def stlm_qkv_rope_bwd_norm(
    up_ptr, more_ptr, x_ptr, gain_ptr, dx_ptr, partial_ptr, tokens, run, stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program walks a run of rows; `up` is g r with r = 1 / rms: dx = g r - x r^2 mean(g r x),
    and `more` where x goes on beside."""
    program, tokens = tl.program_id(0).to(tl.int64), tokens.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    STORED = up_ptr.dtype.element_ty
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for first in range(program * run, tl.minimum((program + 1) * run, tokens), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        live = rows < tokens
        x = _rows_of_x(x_ptr, rows, live, stride, 0, D, STORED, BLOCK_D)
        up = _rows_of_x(up_ptr, rows, live, D, 0, D, STORED, BLOCK_D)
        if gain_ptr is not None:
            sums += up * x
            up *= gain
        square = 1.0 / (tl.sum(x * x, 1) / D + eps)
        dx = up - x * (square * tl.sum(up * x, 1) / D)[:, None]
        if more_ptr is not None:
            mask = live[:, None] & (d < D)[None, :]
            dx += tl.load(more_ptr + rows[:, None] * D + d[None, :], mask=mask, other=0.0)
        put(dx_ptr, dx, rows, live, D, 0, D, BLOCK_D)
    if gain_ptr is not None:
        tl.store(partial_ptr + program * D + d, tl.sum(sums, 0), mask=d < D)


def launch_fwd(
    x: Tensor,  # (N, D)
    norm_weight: Tensor | None,  # (D,)
    weight: Tensor,  # ((H + 2 H_kv) K, D)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    q_weight: Tensor | None,  # (K,)
    k_weight: Tensor | None,  # (K,)
    positions: Tensor | None,  # (period,)
    period: int,
    heads: int,
    kv_heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in `out_dtype`."""
    x, width = _with_rows(x), 2 * cos.shape[1]
    q, k, v = (
        torch.empty((x.shape[0], n, width), dtype=out_dtype, device=x.device)
        for n in (heads, kv_heads, kv_heads)
    )
    programs, shape = _shape("fwd", x, width, heads, kv_heads, positions, out_dtype)
    _launch.launch(
        stlm_qkv_rope_fwd, programs,
        x, _dense(norm_weight), weight.to(out_dtype).contiguous(),
        *(cos if w is None else w.contiguous() for w in (q_weight, k_weight)), q, k, v,
        *_tables(cos, sin, positions), x.shape[0], x.stride(0), max(1, period), cos.shape[0], eps,
        *(-1.0 if w is None else eps for w in (q_weight, k_weight)), **shape, device=x.device,
    )  # fmt: skip
    return q, k, v


def launch_bwd(
    grad_q: Tensor,  # (N, H, K)
    grad_k: Tensor,  # (N, H_kv, K)
    grad_v: Tensor,  # (N, H_kv, K)
    grad_x: Tensor | None,  # (N, D)
    x: Tensor,  # (N, D)
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor | None,
    period: int,
    eps: float,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and the weights; empty for what is not there or, of x with its norm's weight
    and of the weight, not wanted."""
    (count, heads, width), kv_heads, dtype = grad_q.shape, grad_k.shape[1], grad_q.dtype
    rows, matrix = _with_rows(x), weight.to(dtype).contiguous()
    dproduct = torch.empty((count, weight.shape[0]), dtype=dtype, device=x.device)
    programs, shape = _shape("bwd", rows, width, heads, kv_heads, positions, dtype)
    blocks = _launch.ceil_div(count, shape["BLOCK"])
    partial = torch.empty((heads + kv_heads, blocks, width), dtype=torch.float32, device=x.device)
    _launch.launch(
        stlm_qkv_rope_bwd, programs, rows, _dense(norm_weight), matrix, _dense(q_weight),
        _dense(k_weight), *(y.contiguous() for y in (grad_q, grad_k, grad_v)), dproduct,
        partial, *_tables(cos, sin, positions), count, rows.stride(0), max(1, period),
        cos.shape[0], eps, **shape, device=x.device,
    )  # fmt: skip
    dx, dgain = x.new_empty(0), x.new_empty(0)
    if want_x:
        dx, dgain = _through_norm(dproduct @ matrix, grad_x, rows, norm_weight, x.dtype, eps)
    dweight = x.new_empty(0)
    if want_weight:
        dweight = _weight_gradient(dproduct, rows.to(dtype), norm_weight, weight.dtype)
    by_head = partial.flatten(0, 1).split([heads * blocks, kv_heads * blocks])
    sums = sum_of_norms(by_head, (q_weight, k_weight), x.dtype)
    return dx, dgain, dweight, *sums


def _through_norm(
    up: Tensor, more: Tensor | None, rows: Tensor, gain: Tensor | None, dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of rows and of their norm's weight, which is empty where there is none."""
    count, dim = rows.shape
    dx = torch.empty((count, dim), dtype=dtype, device=rows.device)
    config = configs.norm_config(dim, up.dtype, rows.device)
    splits, run = _launch.splits(count, 1, config.pop("PROGRAMS"), config["BLOCK"])
    partial = torch.empty((splits, dim), dtype=torch.float32, device=rows.device)
    _launch.launch(
        stlm_qkv_rope_bwd_norm, splits, up, _dense(more), rows, _dense(gain), dx, partial, count,
        run, rows.stride(0), eps, D=dim, BLOCK_D=_launch.block_of(dim, configs.MOST_DIM),
        device=rows.device, **config,
    )  # fmt: skip
    return dx, rows.new_empty(0) if gain is None else sum_splits(partial, gain.dtype)


def _weight_gradient(
    dproduct: Tensor, rows: Tensor, gain: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A product over all rows, in fp32 where a norm's weight follows or torch has it."""
    fine = torch.float32 if gain is not None else dtype
    if fine != dproduct.dtype and dproduct.is_cuda:
        found = torch.mm(dproduct.T, rows, out_dtype=fine)
    else:
        found = dproduct.T @ rows
    return (found if gain is None else found * gain).to(dtype)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _tables(cos: Tensor, sin: Tensor, positions: Tensor | None) -> list[Tensor]:
    return [x.contiguous() for x in (cos, sin, cos if positions is None else positions)]


def _shape(
    kernel: str, x: Tensor, width: int, heads: int, kv_heads: int, positions: Tensor | None,
    dtype: torch.dtype,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Number of programs, and the constants of a kernel."""
    (count, dim), total = x.shape, heads + 2 * kv_heads
    config = configs.rows_config(kernel, count, dim, width, dtype, x.device)
    each = configs.heads_of_program(count, config["BLOCK"], total)
    programs = _launch.ceil_div(count, config["BLOCK"]) * _launch.ceil_div(total, each)
    constants = {
        "D": dim,
        "H": heads,
        "KV": kv_heads,
        "K": width,
        "HAS_POSITIONS": positions is not None,
        "DOT": dot_type(dtype),
        "WIDTH": configs.width_block(width),
        "HEADS": each,
    }
    return programs, constants | config
