"""swiglu in Triton: what is as wide as the hidden layer lives in registers, forward and backward.

With r = 1 / rms(x) of a row, gate = r x G^T, up = r x U^T, act = silu(gate) * up, out = act V + x;
a norm weight is in G and U already. `pack` casts the weights once and lays them out for the loops:
rows of gate and up in turns, then the rows of V = down^T.
Forward. A program owns BLOCK_M rows and walks the hidden layer BLOCK_F at a time: a product for
gate and up, one for its part of the output, which stays in registers. r is stored for the backward.
Backward. `bwd_x` walks likewise, with dact = dout V^T, and adds up dx before the norm.
`bwd_weights` owns BLOCK_F of the hidden layer and a run of rows, forms gate, up and dact again, and
adds up the gradients of its weights; runs are added in order.

Floor (bf16): 4 T D bytes forward, 6 backward; 6 T D F FLOPs forward, 12 backward, 22 with what is
formed again. At T = 65,536, D = 256, F = 768 on an H200 the products take at least 78 us forward
and 286 backward, instructions 33 and 130, and what is read again from L2 129 and 435: each of 512
programs reads all weights, each of 24 tiles of the hidden layer all rows. Larger tiles do not fit
the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, sum_each
from . import config as configs


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _rows(
    x_ptr, first, n_rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, zero=0
):  # fmt: skip
    """Places of BLOCK_M rows, (BLOCK_M, BLOCK_D), and which of them exist."""
    local, d = tl.arange(0, BLOCK_M) + zero, tl.arange(0, BLOCK_D)
    mask = (local < n_rows - first)[:, None] & (d < D)[None, :]
    return x_ptr + first * D + (local[:, None] * D + d[None, :]), mask


@triton.jit
def _weights(packed_ptr, row, DOT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) of what `pack` made, from a row on."""
    place = (row + tl.arange(0, ROWS))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(packed_ptr + place).to(DOT)


@triton.jit
def _times(a, b):
    """a b^T of tiles (M, D) and (N, D)."""
    if a.dtype != tl.float32:
        return tl.dot(a, tl.trans(b))
    # Without a matrix unit a thread holds whole rows: 16 columns at a time, added up after that.
    parts: tl.constexpr = a.shape[1] // 16
    a = tl.permute(tl.reshape(a, (a.shape[0], parts, 16)), (1, 0, 2))
    b = tl.permute(tl.reshape(b, (b.shape[0], parts, 16)), (1, 2, 0))
    return tl.sum(tl.dot(a, b, input_precision="ieee"), 0)


@triton.jit
def _gates(x, pairs, scale):
    """(rows, hidden) gate and up in fp32, from weights of eight gates and eight ups in turns.

    So a thread of a matrix product has both of each of its columns, and nothing is exchanged.
    """
    both = _times(x, pairs) * scale[:, None]
    rows: tl.constexpr = both.shape[0]
    groups: tl.constexpr = both.shape[1] // 16
    both = tl.permute(tl.reshape(both, (rows, groups, 2, 8)), (0, 1, 3, 2))
    gate, up = tl.split(both)
    return tl.reshape(gate, (rows, 8 * groups)), tl.reshape(up, (rows, 8 * groups))


@triton.jit
def _gates_gradient(gate, up, dact):
    """(rows, hidden) gradients of gate and up."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return dact * up * (sigmoid + silu - silu * sigmoid), dact * silu


@triton.jit
def _in_turns(gate, up):
    """(rows, 2 * hidden), the columns as `_gates` had them."""
    rows: tl.constexpr = gate.shape[0]
    groups: tl.constexpr = gate.shape[1] // 8
    both = tl.join(tl.reshape(gate, (rows, groups, 8)), tl.reshape(up, (rows, groups, 8)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (rows, 16 * groups))


@triton.jit
def stlm_swiglu_pack(
    gate_up_ptr, down_ptr, packed_ptr,
    D: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program casts the weights of BLOCK_F of the hidden layer; what does not exist is zero."""
    f, d = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    stored = packed_ptr.dtype.element_ty
    mask = (f < F)[:, None] & (d < D)[None, :]
    place = gate_up_ptr + f[:, None] * D + d[None, :]
    gate = tl.load(place, mask=mask, other=0.0)
    up = tl.load(place + F * D, mask=mask, other=0.0)
    place = down_ptr + d[:, None] * F + f[None, :]
    down = tl.load(place, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)
    place = packed_ptr + (f // 8 * 16 + f % 8)[:, None] * BLOCK_D + d[None, :]
    tl.store(place, gate.to(stored))
    tl.store(place + 8 * BLOCK_D, up.to(stored))
    place = packed_ptr + (2 * F_PAD + f)[:, None] * BLOCK_D + d[None, :]
    tl.store(place, tl.trans(down.to(stored)))


@triton.jit(do_not_specialize=["n_rows"])
def stlm_swiglu_fwd(
    x_ptr, packed_ptr, out_ptr, scale_ptr, n_rows, eps,
    D: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, DOT: tl.constexpr,
    IS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, local = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    stored = out_ptr.dtype.element_ty
    place, mask = _rows(x_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
    x = tl.load(place, mask=mask, other=0.0).to(stored).to(DOT)
    fine = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(fine * fine, 1) / D + eps)
    tl.store(scale_ptr + first + local, scale, mask=local < n_rows - first)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for f in range(0, F, BLOCK_F):
        gate, up = _gates(x, _weights(packed_ptr, 2 * f, DOT, 2 * BLOCK_F, BLOCK_D), scale)
        down = _weights(packed_ptr, 2 * F_PAD + f, DOT, BLOCK_F, BLOCK_D)
        act = gate * _sigmoid(gate) * up
        acc = tl.dot(act.to(DOT), down, acc, input_precision="ieee")
    if IS_RESIDUAL:  # read again: in registers it would not fit beside the sums
        acc += tl.load(place, mask=mask, other=0.0).to(stored).to(tl.float32)
    place, mask = _rows(out_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
    tl.store(place, acc.to(stored), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "zero"])
def stlm_swiglu_bwd_x(
    grad_ptr, x_ptr, scale_ptr, packed_ptr, dx_ptr, n_rows, zero,
    D: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, DOT: tl.constexpr,
    IS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, local = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    stored = grad_ptr.dtype.element_ty
    place, mask = _rows(x_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
    x = tl.load(place, mask=mask, other=0.0).to(stored).to(DOT)
    place, _ = _rows(grad_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
    grad = tl.load(place, mask=mask, other=0.0).to(DOT)
    scale = tl.load(scale_ptr + first + local, mask=local < n_rows - first, other=1.0)
    acc, pull = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if IS_RESIDUAL:
        acc += grad.to(tl.float32) / scale[:, None]
    for f in range(0, F, BLOCK_F):
        pairs = _weights(packed_ptr, 2 * f, DOT, 2 * BLOCK_F, BLOCK_D)
        down = _weights(packed_ptr, 2 * F_PAD + f, DOT, BLOCK_F, BLOCK_D)
        gate, up = _gates(x, pairs, scale)
        dact = _times(grad, down)
        dgate, dup = _gates_gradient(gate, up, dact)
        pull += tl.sum(dgate * gate + dup * up, 1)
        acc = tl.dot(_in_turns(dgate, dup).to(DOT), pairs, acc, input_precision="ieee")
    # `zero` hides from the compiler that the places are those of before, which it would keep.
    place, mask = _rows(x_ptr, first, n_rows, D, BLOCK_M, BLOCK_D, zero)
    x = tl.load(place, mask=mask, other=0.0).to(stored).to(tl.float32)
    acc = acc * scale[:, None] - x * (pull * scale * scale / D)[:, None]
    place, _ = _rows(dx_ptr, first, n_rows, D, BLOCK_M, BLOCK_D, zero)
    tl.store(place, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "run"])
def stlm_swiglu_bwd_weights(
    grad_ptr, x_ptr, scale_ptr, packed_ptr, dgate_up_ptr, ddown_ptr, n_rows, run,
    D: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients are (D, hidden) in registers, so that each product has a whole operand in memory
    and none is a product's result turned over."""
    tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    split = (tl.program_id(0) // tiles).to(tl.int64)
    f, local, d = (tl.program_id(0) % tiles) * BLOCK_F, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    stored = grad_ptr.dtype.element_ty
    pairs = _weights(packed_ptr, 2 * f, DOT, 2 * BLOCK_F, BLOCK_D)
    down = _weights(packed_ptr, 2 * F_PAD + f, DOT, BLOCK_F, BLOCK_D)
    dpairs = tl.zeros((BLOCK_D, 2 * BLOCK_F), tl.float32)
    ddown = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    for first in range(split * run, tl.minimum((split + 1) * run, n_rows), BLOCK_M):
        place, mask = _rows(x_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
        x = tl.load(place, mask=mask, other=0.0).to(stored).to(DOT)
        tl.debug_barrier()  # the registers cannot hold the rows of both on their way
        place, _ = _rows(grad_ptr, first, n_rows, D, BLOCK_M, BLOCK_D)
        grad = tl.load(place, mask=mask, other=0.0).to(DOT)
        scale = tl.load(scale_ptr + first + local, mask=local < n_rows - first, other=0.0)
        gate, up = _gates(x, pairs, scale)
        act = (gate * _sigmoid(gate) * up).to(DOT)
        ddown = tl.dot(tl.trans(grad), act, ddown, input_precision="ieee")
        dact = _times(grad, down)
        dgate, dup = _gates_gradient(gate, up, dact * scale[:, None])
        both = _in_turns(dgate, dup).to(DOT)
        dpairs = tl.dot(tl.trans(x), both, dpairs, input_precision="ieee")
    column = tl.arange(0, 2 * BLOCK_F)
    hidden = f + column // 16 * 8 + column % 8
    place = (hidden + column // 8 % 2 * F)[None, :] * D + d[:, None]
    mask = (hidden < F)[None, :] & (d < D)[:, None]
    tl.store(dgate_up_ptr + split * (2 * F * D) + place, dpairs, mask=mask)
    hidden = f + tl.arange(0, BLOCK_F)
    mask = (hidden < F)[None, :] & (d < D)[:, None]
    place = d[:, None] * F + hidden[None, :]
    tl.store(ddown_ptr + split * (D * F) + place, ddown, mask=mask)


def launch_fwd(
    x: Tensor,  # (T, D)
    gate_up: Tensor,  # (2F, D)
    down: Tensor,  # (D, F)
    residual: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, D) in `out_dtype`; 1 / rms (T,) of the rows; the weights as the backward wants them."""
    (total, width), hidden = x.shape, down.shape[1]
    x = x.to(out_dtype).contiguous()  # fp32 on its way would take the registers of the sums
    gate_up, down = gate_up.contiguous(), down.contiguous()
    shape = _shape(width, hidden)
    packed = torch.empty(configs.packed_shape(width, hidden), dtype=out_dtype, device=x.device)
    config = configs.pack_config(width, x.device)
    _launch.launch(
        stlm_swiglu_pack, shape["F_PAD"] // config["BLOCK_F"], gate_up, down, packed,
        **shape, device=x.device, **config,
    )  # fmt: skip
    out = torch.empty((total, width), dtype=out_dtype, device=x.device)
    scale = torch.empty(total, dtype=torch.float32, device=x.device)
    config = configs.rows_config("fwd", total, width, out_dtype, x.device)
    _launch.launch(
        stlm_swiglu_fwd, _launch.ceil_div(total, config["BLOCK_M"]),
        x, packed, out, scale, total, eps,
        IS_RESIDUAL=residual, DOT=dot_type(out_dtype), **shape, device=x.device, **config,
    )  # fmt: skip
    return out, scale, packed


def launch_bwd(
    grad: Tensor,  # (T, D)
    x: Tensor,  # (T, D)
    gate_up: Tensor,  # (2F, D)
    down: Tensor,  # (D, F)
    scale: Tensor,  # (T,) fp32
    packed: Tensor,
    residual: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up and down; empty where not wanted."""
    (total, width), hidden = x.shape, down.shape[1]
    given = grad.contiguous(), x.to(grad.dtype).contiguous(), scale, packed
    options = {**_shape(width, hidden), "DOT": dot_type(grad.dtype), "device": x.device}
    dx = torch.empty(x.shape if wants[0] else 0, dtype=x.dtype, device=x.device)
    if wants[0]:
        config = configs.rows_config("bwd_x", total, width, grad.dtype, x.device)
        _launch.launch(
            stlm_swiglu_bwd_x, _launch.ceil_div(total, config["BLOCK_M"]),
            *given, dx, total, 0, IS_RESIDUAL=residual, **options, **config,
        )  # fmt: skip
    if not (wants[1] or wants[2]):
        return dx, x.new_empty(0, dtype=gate_up.dtype), x.new_empty(0, dtype=down.dtype)
    config = configs.weights_config(total, width, grad.dtype, x.device)
    tiles = _launch.ceil_div(hidden, config["BLOCK_F"])
    splits, run = _launch.splits(total, tiles, config.pop("PROGRAMS"), config["BLOCK_M"])
    sums = [
        torch.empty((splits, *each.shape), dtype=torch.float32, device=x.device)
        for each in (gate_up, down)
    ]
    _launch.launch(
        stlm_swiglu_bwd_weights, splits * tiles, *given, *sums, total, run, **options, **config,
    )  # fmt: skip
    dgate_up, ddown = sum_each(sums, (gate_up.dtype, down.dtype), wants[1:])
    return dx, dgate_up, ddown


def _shape(width: int, hidden: int) -> dict[str, int]:
    rows, block = configs.packed_shape(width, hidden)
    return {"D": width, "F": hidden, "F_PAD": rows // 3, "BLOCK_D": block}
