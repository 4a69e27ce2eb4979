"""Row losses in Triton for vocabularies of up to 512 columns: logits never leave the chip.

For a block of rows, z = cap(scale * (E H^T + b)) is formed with the columns down and the rows
across, in a power-of-two block of columns and a narrow one behind it (258 = 256 + 16).
loss = lse - (1 - s) z_y - s mean(z) + w lse^2, with smoothing s and z-loss weight w; class weights
multiply each log-probability z - lse in it. They lie behind the biases (`column_table`).

Forward. A program owns BLOCK_N rows: one pass over D, then max, sum and the picked column in fp32.
Backward. From the saved row maxima and sums the logits' gradient G is formed again, in [-1, 1]: the
upstream gradient divided by its largest magnitude goes in before rounding; the magnitude itself and
the scale multiply the fp32 accumulators at the end, so that 16-bit products keep their range. One
kernel owns BLOCK_N rows and stores dH^T = E^T G transposed by address; the other owns BLOCK_V x
BLOCK_W of dE for one run of rows and adds G H into registers; the runs' partial sums are added in a
fixed order. No accumulator is ever transposed (Triton up to 3.7.0 miscompiles that on Hopper).

Floor, N = 65,536, D = 128, V = 256: three products of 4.3 GFLOP = 16.3 us at 790 TFLOP/s, 34.5 MB
= 8 us, 16.8 M exponentials = 4 us. These kernels do 4 + D / BLOCK_W products: what forming the
logits again costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, logits_tile, sum_splits
from . import config as configs

LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _row_weights(bias_ptr, targets, picked, valid, smoothing, HAS_WEIGHTS: tl.constexpr):
    """Factors of the log-probability of each row's target, and of those of all columns."""
    hard, total = tl.full(targets.shape, 1.0, tl.float32), valid * 1.0
    if HAS_WEIGHTS:
        hard = tl.load(bias_ptr + valid + targets, mask=picked, other=0.0)
        total = tl.load(bias_ptr + 2 * valid)
    hard *= 1.0 - smoothing
    # Without smoothing the weights of other columns may be infinite.
    return hard, hard + tl.where(smoothing > 0, smoothing * (total / valid), 0.0)


@triton.jit
def _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS: tl.constexpr):
    """Factors of the log-probabilities of columns in every row; 0 where none exists."""
    weights = tl.full(columns.shape, 1.0, tl.float32)
    if HAS_WEIGHTS:
        weights = tl.load(bias_ptr + valid + columns, mask=columns < valid, other=0.0)
    return tl.where((columns < valid) & (smoothing > 0), weights * (smoothing / valid), 0.0)


@triton.jit
def _statistics(z, columns, targets, soft):
    """Largest logit, sum of exponentials below it, picked logit and weighted sum of each row."""
    top = tl.maximum(tl.max(z, 0), LEAST)  # a bias of -inf may rule a whole tile out
    total = tl.sum(tl.exp(z - top[None, :]), 0)
    picked = tl.sum(tl.where(columns[:, None] == targets[None, :], z, 0.0), 0)
    # Logits of -inf count only where they are smoothed over.
    plain = tl.sum(tl.where((soft != 0)[:, None], z * soft[:, None], 0.0), 0)
    return top, total, picked, plain


@triton.jit
def _merged(top, total, picked, plain, tile_top, tile_total, tile_picked, tile_plain):
    """The statistics of two tiles together."""
    both = tl.maximum(top, tile_top)
    total = total * tl.exp(top - both) + tile_total * tl.exp(tile_top - both)
    return both, total, picked + tile_picked, plain + tile_plain


@triton.jit
def _loss_of(top, total, picked, plain, bad, hard, mass, z_loss):
    """Loss, log-sum-exp, and the latter's part above the largest logit."""
    log_total = tl.log(total)
    lse = top + log_total
    # Differences from the largest logit first: a confident row's loss keeps its digits.
    loss = mass * log_total + hard * (top - picked) + ((mass - hard) * top - plain)
    return tl.where(bad, float("nan"), loss + z_loss * lse * lse), lse, log_total


@triton.jit
def _row_targets(target_ptr, rows, n_rows, ignore_index, valid):
    """Targets in 32 bits, which rows count, and which of those name no column."""
    raw = tl.load(target_ptr + rows, mask=rows < n_rows, other=0).to(tl.int64)
    live = (rows < n_rows) & (raw != ignore_index)
    bad = live & ((raw < 0) | (raw >= valid))
    return tl.where(bad, -1, raw).to(tl.int32), live, bad


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def stlm_linear_logprobs_fwd(
    h_ptr, w_ptr, bias_ptr, target_ptr, loss_ptr, lse_ptr, top_ptr, log_total_ptr,
    n_rows, valid, scale, cap, smoothing, z_loss, ignore_index,
    D: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    targets, live, bad = _row_targets(target_ptr, rows, n_rows, ignore_index, valid)
    hard, mass = _row_weights(bias_ptr, targets, live & ~bad, valid, smoothing, HAS_WEIGHTS)
    columns = tl.arange(0, MAIN)
    z = logits_tile(
        h_ptr, w_ptr, bias_ptr, rows, live, columns, valid, scale, cap, D, DOT, HAS_BIAS, BLOCK_D
    )
    soft = _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS)
    top, total, picked, plain = _statistics(z, columns, targets, soft)
    if TAIL > 0:
        columns = MAIN + tl.arange(0, TAIL)
        z = logits_tile(
            h_ptr, w_ptr, bias_ptr, rows, live, columns, valid, scale, cap,
            D, DOT, HAS_BIAS, BLOCK_D,
        )  # fmt: skip
        soft = _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS)
        tail_top, tail_total, tail_picked, tail_plain = _statistics(z, columns, targets, soft)
        top, total, picked, plain = _merged(
            top, total, picked, plain, tail_top, tail_total, tail_picked, tail_plain
        )
    loss, lse, log_total = _loss_of(top, total, picked, plain, bad, hard, mass, z_loss)
    tl.store(loss_ptr + rows, tl.where(live, loss, 0.0), mask=rows < n_rows)
    tl.store(lse_ptr + rows, tl.where(live, lse, 0.0), mask=rows < n_rows)
    tl.store(top_ptr + rows, tl.where(live, top, 0.0), mask=rows < n_rows)
    tl.store(log_total_ptr + rows, tl.where(live, log_total, 0.0), mask=rows < n_rows)


@triton.jit
def _upstream(
    bias_ptr, target_ptr, top_ptr, log_total_ptr, dloss_ptr, dlse_ptr, unit, rows,
    n_rows, valid, smoothing, z_loss, ignore_index, dloss_stride, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Quantities of each row that the gradient of a block of rows needs."""
    targets, live, bad = _row_targets(target_ptr, rows, n_rows, ignore_index, valid)
    hard, mass = _row_weights(bias_ptr, targets, live & ~bad, valid, smoothing, HAS_WEIGHTS)
    # Ignored rows: no exponential, so no overflow.
    top = tl.load(top_ptr + rows, mask=live, other=float("inf"))
    log_total = tl.load(log_total_ptr + rows, mask=live, other=0.0)
    dloss, slope = _slopes(
        dloss_ptr + rows * dloss_stride, dlse_ptr + rows, unit, live, bad, mass, top + log_total,
        z_loss,
    )  # fmt: skip
    return targets, live, top, log_total, dloss, slope, hard


@triton.jit
def _slopes(dloss_ptrs, dlse_ptrs, unit, live, bad, mass, lse, z_loss):
    """Upstream gradients of the losses, and what multiplies the probabilities."""
    dloss = tl.load(dloss_ptrs, mask=live, other=0.0) / unit
    dloss = tl.where(bad, float("nan"), dloss)
    slope = dloss * (mass + 2.0 * z_loss * tl.where(live, lse, 0.0))
    return dloss, slope + tl.load(dlse_ptrs, mask=live, other=0.0) / unit


@triton.jit
def _dlogits(
    z, columns, targets, top, log_total, dloss, slope, hard, soft, valid, cap
):  # fmt: skip
    """Gradient of the scaled products before the cap; zero in columns that do not exist."""
    grad = tl.exp((z - top[None, :]) - log_total[None, :]) * slope[None, :]
    hit = columns[:, None] == targets[None, :]
    grad -= (tl.where(hit, hard[None, :], 0.0) + soft[:, None]) * dloss[None, :]
    if cap > 0:
        grad *= 1.0 - (z / cap) * (z / cap)
    return tl.where((columns < valid)[:, None], grad, 0.0)


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "dloss_stride"])
def stlm_linear_logprobs_bwd_rows(
    h_ptr, w_ptr, bias_ptr, target_ptr, top_ptr, log_total_ptr, dloss_ptr, dlse_ptr, unit_ptr,
    dh_ptr,
    n_rows, valid, scale, cap, smoothing, z_loss, ignore_index, dloss_stride,
    D: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.load(unit_ptr)
    targets, live, top, log_total, dloss, slope, hard = _upstream(
        bias_ptr, target_ptr, top_ptr, log_total_ptr, dloss_ptr, dlse_ptr, unit, rows,
        n_rows, valid, smoothing, z_loss, ignore_index, dloss_stride, HAS_WEIGHTS,
    )  # fmt: skip
    main = tl.arange(0, MAIN)
    z = logits_tile(
        h_ptr, w_ptr, bias_ptr, rows, live, main, valid, scale, cap, D, DOT, HAS_BIAS, BLOCK_D
    )
    soft = _column_weights(bias_ptr, main, valid, smoothing, HAS_WEIGHTS)
    grad = _dlogits(
        z, main, targets, top, log_total, dloss, slope, hard, soft, valid, cap
    ).to(DOT)  # fmt: skip
    if TAIL > 0:
        tail = MAIN + tl.arange(0, TAIL)
        z = logits_tile(
            h_ptr, w_ptr, bias_ptr, rows, live, tail, valid, scale, cap, D, DOT, HAS_BIAS, BLOCK_D
        )
        soft = _column_weights(bias_ptr, tail, valid, smoothing, HAS_WEIGHTS)
        grad_tail = _dlogits(
            z, tail, targets, top, log_total, dloss, slope, hard, soft, valid, cap
        ).to(DOT)  # fmt: skip
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        dh = tl.dot(_table_tile(w_ptr, main, d, valid, D, DOT), grad, input_precision="ieee")
        if TAIL > 0:
            table = _table_tile(w_ptr, tail, d, valid, D, DOT)
            dh = tl.dot(table, grad_tail, dh, input_precision="ieee")
        mask = (d < D)[:, None] & (rows < n_rows)[None, :]
        out = (dh * (unit * scale)).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + rows[None, :] * D + d[:, None], out, mask=mask)


@triton.jit
def _table_tile(w_ptr, columns, d, valid, D: tl.constexpr, DOT: tl.constexpr):
    """(d, columns) of E^T, transposed by address."""
    mask = (d < D)[:, None] & (columns < valid)[None, :]
    table = w_ptr + columns.to(tl.int64)[None, :] * D + d[:, None]
    return tl.load(table, mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "run", "dloss_stride"])
def stlm_linear_logprobs_bwd_weight(
    h_ptr, w_ptr, bias_ptr, target_ptr, top_ptr, log_total_ptr, dloss_ptr, dlse_ptr, unit_ptr,
    dw_ptr, db_ptr,
    n_rows, valid, scale, cap, smoothing, z_loss, ignore_index, run, dloss_stride,
    D: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    v_tiles, d_tiles = tl.cdiv(COLUMNS, BLOCK_V), tl.cdiv(D, BLOCK_W)
    columns = FIRST + (program % v_tiles).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = (program // v_tiles % d_tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    split = program // (v_tiles * d_tiles)
    unit = tl.load(unit_ptr)
    soft = _column_weights(bias_ptr, columns, valid, smoothing, HAS_WEIGHTS)
    dw, db = tl.zeros((BLOCK_V, BLOCK_W), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    for first in range(split * run, tl.minimum((split + 1) * run, n_rows), BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        targets, live, top, log_total, dloss, slope, hard = _upstream(
            bias_ptr, target_ptr, top_ptr, log_total_ptr, dloss_ptr, dlse_ptr, unit, rows,
            n_rows, valid, smoothing, z_loss, ignore_index, dloss_stride, HAS_WEIGHTS,
        )  # fmt: skip
        z = logits_tile(
            h_ptr, w_ptr, bias_ptr, rows, live, columns, valid, scale, cap,
            D, DOT, HAS_BIAS, BLOCK_D,
        )  # fmt: skip
        grad = _dlogits(z, columns, targets, top, log_total, dloss, slope, hard, soft, valid, cap)
        mask = live[:, None] & (d < D)[None, :]
        h = tl.load(h_ptr + rows[:, None] * D + d[None, :], mask=mask, other=0.0).to(DOT)
        dw = tl.dot(grad.to(DOT), h, dw, input_precision="ieee")
        db += tl.sum(grad, 1)
    mask = (columns < valid)[:, None] & (d < D)[None, :]
    out = dw_ptr + (split * valid + columns)[:, None] * D + d[None, :]
    tl.store(out, dw * (unit * scale), mask=mask)
    # Programs of other columns of D hold the same sums; storing them again changes nothing.
    tl.store(db_ptr + split * valid + columns, db * (unit * scale), mask=columns < valid)


def launch_fwd(
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    dot_dtype: torch.dtype,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    valid_vocab: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, ...]:
    """(loss, lse, largest logit, lse minus that), each (N,) fp32."""
    count, width = rows.shape
    outputs = [torch.empty(count, device=rows.device, dtype=torch.float32) for _ in range(4)]
    config = configs.fwd_config(width, valid_vocab, dot_dtype, rows.device)
    main, tail = configs.vocab_blocks(valid_vocab)
    rows, weight, targets = rows.contiguous(), weight.contiguous(), targets.contiguous()
    columns = column_table(bias, class_weight, valid_vocab)
    _launch.launch(
        stlm_linear_logprobs_fwd, _launch.ceil_div(count, config["BLOCK_N"]),
        rows, weight, weight if columns is None else columns, targets, *outputs,
        count, valid_vocab, logit_scale, softcap, label_smoothing, z_loss, ignore_index,
        D=width, DOT=dot_type(dot_dtype), HAS_BIAS=columns is not None,
        HAS_WEIGHTS=class_weight is not None, MAIN=main, TAIL=tail, device=rows.device, **config,
    )  # fmt: skip
    return tuple(outputs)


def launch_bwd_rows(
    dloss: Tensor,  # (N,) of any stride
    dlse: Tensor,  # (N,)
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    top: Tensor,  # (N,)
    log_total: Tensor,  # (N,)
    dot_dtype: torch.dtype,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    valid: int,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    """(N, D) gradient of the rows."""
    count, width = rows.shape
    config = configs.bwd_rows_config(width, valid, dot_dtype, rows.device)
    main, tail = configs.vocab_blocks(valid)
    drows = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    columns = column_table(bias, class_weight, valid)
    _launch.launch(
        stlm_linear_logprobs_bwd_rows, _launch.ceil_div(count, config["BLOCK_N"]),
        rows.contiguous(), weight.contiguous(), weight if columns is None else columns,
        targets.contiguous(), top, log_total, dloss, dlse.contiguous(),
        _largest_upstream(dloss, dlse), drows,
        count, valid, logit_scale, softcap, smoothing, z_loss, ignore_index, dloss.stride(0),
        D=width, DOT=dot_type(dot_dtype), HAS_BIAS=columns is not None,
        HAS_WEIGHTS=class_weight is not None, MAIN=main, TAIL=tail, device=rows.device, **config,
    )  # fmt: skip
    return drows


def launch_bwd_weight(
    dloss: Tensor,  # (N,) of any stride
    dlse: Tensor,  # (N,)
    rows: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,)
    top: Tensor,  # (N,)
    log_total: Tensor,  # (N,)
    dot_dtype: torch.dtype,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    valid: int,
    smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """(V, D) gradient of the weight and (V,) of the bias (empty without one)."""
    (count, width), device = rows.shape, rows.device
    config = configs.bwd_weight_config(width, valid, dot_dtype, device)
    programs, block_v = config.pop("PROGRAMS"), config.pop("BLOCK_V")
    main, tail = configs.vocab_blocks(valid)
    tiles = _launch.ceil_div(main, block_v) * _launch.ceil_div(width, config["BLOCK_W"])
    splits, run = _launch.splits(count, tiles, programs, config["BLOCK_N"])
    dweight = torch.empty(splits, valid, width, dtype=torch.float32, device=device)
    dbias = torch.empty(splits, valid, dtype=torch.float32, device=device)
    # The narrow block behind the main one is a launch of its own, with tiles of its own height.
    unit, d_tiles = _largest_upstream(dloss, dlse), _launch.ceil_div(width, config["BLOCK_W"])
    columns = column_table(bias, class_weight, valid)
    for first, wide in ((0, main), (main, tail)) if tail else ((0, main),):
        block = min(block_v, wide)
        warps = {"num_warps": 4} if block < 64 else {}
        _launch.launch(
            stlm_linear_logprobs_bwd_weight, splits * d_tiles * _launch.ceil_div(wide, block),
            rows.contiguous(), weight.contiguous(), weight if columns is None else columns,
            targets.contiguous(), top, log_total, dloss, dlse.contiguous(),
            unit, dweight, dbias,
            count, valid, logit_scale, softcap, smoothing, z_loss, ignore_index, run,
            dloss.stride(0),
            D=width, DOT=dot_type(dot_dtype), HAS_BIAS=columns is not None,
            HAS_WEIGHTS=class_weight is not None, FIRST=first, COLUMNS=wide, BLOCK_V=block,
            device=device, **config | warps,
        )  # fmt: skip
    table = _padded(sum_splits(dweight, weight.dtype), weight.shape[0])
    if bias is None:
        return table, rows.new_empty(0)
    return table, _padded(sum_splits(dbias, bias.dtype), weight.shape[0])


def column_table(bias: Tensor | None, class_weight: Tensor | None, valid: int) -> Tensor | None:
    """Operand added to or multiplied with each column: the bias, or (2 valid + 1,) fp32
    biases, class weights and the sum of the latter; None for neither."""
    if class_weight is None:
        return None if bias is None else bias.contiguous()
    classes = class_weight[:valid].float()
    biases = torch.zeros_like(classes) if bias is None else bias[:valid].float()
    return torch.cat([biases, classes, classes.sum(0, keepdim=True)])


def _padded(grad: Tensor, vocab: int) -> Tensor:
    """Rows that no logit came from have no gradient."""
    missing = vocab - grad.shape[0]
    return grad if missing == 0 else torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])


def _largest_upstream(dloss: Tensor, dlse: Tensor) -> Tensor:
    """(1,) fp32 magnitude that upstream gradients are divided by; 1 for zero or infinity."""
    if dloss.shape[0] == 0:
        return dloss.new_ones(1)
    distinct = dloss[:1] if dloss.stride(0) == 0 else dloss
    unit = torch.maximum(distinct.abs().amax(), dlse.abs().amax())
    # Infinite: perhaps an ignored row's, which must not reach the others.
    return torch.where((unit > 0) & (unit < torch.inf), unit, 1.0).view(1)
