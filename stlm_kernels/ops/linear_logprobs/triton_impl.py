"""Row losses in Triton for vocabularies of up to 512 columns: logits never leave the chip.

For a block of rows, z = cap(scale * (H E^T + b)) is formed with the rows down and the columns
across, in a power-of-two block of columns and a narrow one behind it (258 = 256 + 16), so that a
row's statistics stay within a warp or two.
loss = lse - (1 - s) z_y - s mean(z) + w lse^2, with smoothing s and z-loss weight w; class weights
multiply each log-probability z - lse in it.

A program takes every PROGRAMS-th block of rows, with the table in shared memory where it fits. It
stores each row's loss, or its own sum of losses, which `mean` adds up in a fixed order and divides.
The backward is in `backward_impl`.

Floor, N = 65,536, D = 128, V = 256: one product of 4.3 GFLOP = 5.4 us at 790 TFLOP/s, 17 MB = 4 us,
16.8 M exponentials = 4 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.row_losses import (
    BAD,
    IGNORED,
    LN2,
    both_logits,
    picked_logits,
    row_codes,
    smoothing_weights,
    sum_of_powers,
    tables,
    target_weights,
    weighted_sum,
)
from ..._triton.tiles import dot_type, side_by_side
from . import config as configs


@triton.jit(do_not_specialize=["n_rows", "programs", "ignore_index"])
def stlm_linear_logprobs_fwd(
    h_ptr, w_ptr, bias_ptr, class_ptr, target_ptr, loss_ptr, lse_ptr, top_ptr, log_total_ptr,
    codes_ptr, partial_ptr,
    n_rows, programs, scale, cap, smoothing, z_loss, ignore_index,
    D: tl.constexpr, VALID: tl.constexpr, DOT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A result whose pointer is None is not stored."""
    program, local = tl.program_id(0), tl.arange(0, BLOCK_N)
    table, rest = tables(w_ptr, D, VALID, DOT, MAIN, TAIL, BLOCK_D)
    soft, soft_rest, soft_total = smoothing_weights(class_ptr, smoothing, VALID, MAIN, TAIL)
    losses, counted = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for block in range(program, tl.cdiv(n_rows, BLOCK_N), programs):
        first = tl.cast(block, tl.int64) * BLOCK_N
        inside = local < n_rows - first
        codes = row_codes(target_ptr, first, local, inside, ignore_index, VALID)
        live = codes != IGNORED
        z, y, top = both_logits(
            h_ptr, w_ptr, bias_ptr, table, rest, first, local, live, scale, cap,
            D, VALID, DOT, MAIN, TAIL, BLOCK_D,
        )  # fmt: skip
        log2_total = tl.log2(sum_of_powers(z, y, top, TAIL))
        log_total = log2_total * LN2
        # Differences from the largest logit first: a confident row's loss keeps its digits.
        behind = top - picked_logits(z, y, codes, MAIN, TAIL)
        if smoothing is None and class_ptr is None:
            loss = log_total + behind
        else:
            hard = target_weights(class_ptr, codes, smoothing)
            loss = (hard + soft_total) * log_total + hard * behind
        if smoothing is not None:
            plain = weighted_sum(z, soft)
            if TAIL > 0:
                plain += weighted_sum(y, soft_rest)
            loss += soft_total * top - plain
        if z_loss is not None:
            loss += z_loss * (top + log_total) * (top + log_total)
        loss = tl.where(live, tl.where(codes == BAD, float("nan"), loss), 0.0)
        if loss_ptr is not None:
            tl.store(loss_ptr + first + local, loss, mask=inside)
        if lse_ptr is not None:
            lse = tl.where(live, top + log_total, 0.0)
            tl.store(lse_ptr + first + local, lse, mask=inside)
        if top_ptr is not None:
            # A row that does not count has no powers, one with a bad target NaN.
            known = tl.where(codes == BAD, float("nan"), log2_total)
            known = tl.where(live, known, float("inf"))
            tl.store(top_ptr + first + local, tl.where(live, top, 0.0), mask=inside)
            tl.store(log_total_ptr + first + local, known, mask=inside)
            tl.store(codes_ptr + first + local, codes, mask=inside)
        if partial_ptr is not None:
            losses += loss
            counted += tl.where(live, target_weights(class_ptr, codes, None), 0.0)
    if partial_ptr is not None:
        tl.store(partial_ptr + program, tl.sum(losses, 0))
        tl.store(partial_ptr + programs + program, tl.sum(counted, 0))


@triton.jit(do_not_specialize=["programs"])
def stlm_linear_logprobs_mean(
    partial_ptr, loss_ptr, divisor_ptr, programs, IS_MEAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum of the losses, or their mean: over no row it is NaN."""
    losses, counted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        here = first + side_by_side(BLOCK, 1)
        losses += tl.load(partial_ptr + here, mask=here < programs, other=0.0)
        counted += tl.load(partial_ptr + programs + here, mask=here < programs, other=0.0)
    loss, divisor = tl.sum(losses, 0), tl.sum(counted, 0)
    if IS_MEAN:
        loss = tl.where(divisor != 0, loss / divisor, float("nan"))
    tl.store(loss_ptr, loss)
    tl.store(divisor_ptr, divisor)


class Head(NamedTuple):
    """Operands and options that every kernel of row losses takes, options not used as None."""

    operands: tuple[Tensor | None, ...]
    """Rows, table, bias, class weights and targets, contiguous."""
    scale: float | None
    cap: float | None
    smoothing: float | None
    z_loss: float | None
    ignore_index: int
    shape: dict[str, Any]
    """Constants that kernels are compiled for."""

    @property
    def options(self) -> tuple[Any, ...]:
        return self[1:-1]

    @property
    def table(self) -> Tensor:
        """(V, D) in the products' dtype."""
        table = self.operands[1]
        assert table is not None
        return table


def head_of(
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
) -> Head:
    if weight.dtype != dot_dtype:
        # Under autocast: a cast of the table costs a small launch, casts in every tile cost spills.
        weight = weight.to(dot_dtype)
    tensors = (rows, weight, bias, class_weight, targets)
    main, tail = configs.vocab_blocks(valid_vocab)
    return Head(
        tuple([None if x is None else x.contiguous() for x in tensors]),
        None if logit_scale == 1 else logit_scale,
        softcap or None,
        label_smoothing or None,
        z_loss or None,
        ignore_index,
        {
            "D": rows.shape[1], "VALID": valid_vocab, "DOT": dot_type(dot_dtype),
            "MAIN": main, "TAIL": tail,
        },
    )  # fmt: skip


def head_and_wants(
    operands: Sequence[Tensor | None], dot_dtype: torch.dtype, options_and_wants: Sequence[Any]
) -> tuple[Head, Sequence[bool]]:
    """Split the options of a backward, which end in whether each gradient is required."""
    return head_of(*operands, dot_dtype, *options_and_wants[:-3]), options_and_wants[-3:]


def upstream_of(dloss: Tensor | None, rows: Tensor) -> Tensor:
    """The losses' upstream gradient (N,); zeros, one number expanded, where there is none."""
    if dloss is not None:
        return dloss
    return torch.zeros(1, dtype=torch.float32, device=rows.device).expand(rows.shape[0])


def launch_fwd(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,) fp32."""
    head = head_of(rows, weight, targets, bias, class_weight, dot_dtype, *options)
    loss, lse = (_fp32(rows, rows.shape[0]) for _ in range(2))
    _launch_fwd(head, rows, dot_dtype, (loss, lse, None, None, None))
    return loss, lse


def launch_sum(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    dot_dtype: torch.dtype,
    *options_and_wants: Any,
) -> tuple[Tensor, ...]:
    """Sum or mean of the losses, the lse of each row if asked, the mean's divisor, and of each row,
    where they are kept for the backward, largest logit, log2 of the sum of powers and code."""
    *options, mean, with_lse, kept = options_and_wants
    head = head_of(rows, weight, targets, bias, class_weight, dot_dtype, *options)
    count = rows.shape[0]
    lse = top = log_total = codes = None
    if with_lse:
        lse = _fp32(rows, count)
    if kept:
        top, log_total = _fp32(rows, count), _fp32(rows, count)
        codes = torch.empty(count, dtype=torch.int32, device=rows.device)
    results = (None, lse, top, log_total, codes)
    partial = _launch_fwd(head, rows, dot_dtype, results, with_partial=True)
    # Here, and not before, so that the kernel begins the sooner.
    loss, divisor = _fp32(rows), _fp32(rows)
    _launch.launch(
        stlm_linear_logprobs_mean, 1, partial, loss, divisor, partial.shape[1],
        IS_MEAN=mean, device=rows.device, **configs.mean_config(partial.shape[1], rows.device),
    )  # fmt: skip
    lse, top, log_total = (_fp32(rows, 0) if x is None else x for x in (lse, top, log_total))
    codes = top.new_empty(0, dtype=torch.int32) if codes is None else codes
    return loss, lse, divisor, top, log_total, codes


def _launch_fwd(
    head: Head,
    rows: Tensor,
    dot_dtype: torch.dtype,
    results: Sequence[Tensor | None],
    with_partial: bool = False,
) -> Tensor:
    """(2, programs) sums of losses and of what a mean is divided by, where those are asked for."""
    count, width = rows.shape
    _, _, bias, class_weight, _ = head.operands
    plain = bias is class_weight is head.smoothing is None
    config = configs.fwd_config(width, head.shape["VALID"], dot_dtype, plain, rows.device)
    programs = min(config.pop("PROGRAMS"), _launch.ceil_div(count, config["BLOCK_N"]))
    partial = _fp32(rows, 2, programs)
    _launch.launch(
        stlm_linear_logprobs_fwd, programs,
        *head.operands, *results, partial if with_partial else None,
        count, programs, *head.options, **head.shape, device=rows.device, **config,
    )  # fmt: skip
    return partial


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
