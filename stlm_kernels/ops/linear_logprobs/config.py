"""Limits of the linear_logprobs kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import constant_while_traced
from ..._launch import (
    Config,
    amount,
    block_of,
    bucket,
    ceil_div,
    config_for,
    gpu_of,
    remembered,
    width_bucket,
)

MAX_VOCAB = 512
"""Up to here a row of logits fits on the chip."""

SCRATCH_BYTES = 256 << 20
"""Bytes of fp32 logits at a time above MAX_VOCAB; the gradient's fp32 table comes on top."""

SPARE_BYTES = 2048
"""Shared memory beside the tiles: sums across warps, and what copies of row data take."""

PROGRAMS = 132
"""Runs of rows that sums are made in: one for each SM of an H100."""


def unsupported_reasons(
    *,
    input: Tensor,
    **_: Any,
) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("input", input)


def fits_on_chip(valid: int) -> bool:
    """Return whether the single-tile kernels run; beyond, chunks of logits go through memory."""
    return valid <= MAX_VOCAB


def pitch_of(valid: int) -> int:
    """Columns from one row of a chunk to the next: aligned, whatever the vocabulary."""
    return ceil_div(valid, 128) * 128


def chunk_rows(valid: int) -> int:
    """Rows whose logits fit the scratch; whole tiles of the matrix products."""
    return max(128, SCRATCH_BYTES // (4 * pitch_of(valid)) // 128 * 128)


@remembered
def chunk_config(valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """A row's program keeps a block of logits in registers and walks the row twice."""
    default = {"BLOCK": block_of(valid, 2048), "num_warps": 8}
    shape = bucket(f"V{block_of(valid, 1 << 18)}", dtype)
    return config_for("linear_logprobs_chunk", shape, default, device)


def vocab_blocks(valid: int) -> tuple[int, int]:
    """A power-of-two block of columns and the narrow one behind it (0: none).

    258 columns are 256 + 16, not 512: a twentieth more work instead of twice as much.
    """
    whole = max(16, 1 << (valid - 1).bit_length())
    main = whole // 2
    if main < 16 or main + block_of(valid - main, whole) >= whole:
        return whole, 0
    return main, block_of(valid - main, whole)


def fits_one_kernel(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether one kernel makes both gradients of a plain sum.

    The table and its gradient fill shared memory and registers of sm_90; the products of other
    architectures take more registers, and spill.
    """
    if dtype == torch.float32 or width > 128 or not 192 < valid <= 272:  # 129 to 192: 128 + a tail
        return False
    return _is_sm_90(device)


@constant_while_traced
def _is_sm_90(device: torch.device) -> bool:
    return gpu_of(device).arch == 90


def parts(count: int, valid: int, dtype: torch.dtype) -> list[slice]:
    """Runs of rows whose logits' gradient fits the scratch; whole tiles of the products."""
    step = max(128, SCRATCH_BYTES // (dtype.itemsize * dlogits_pitch(valid)) // 128 * 128)
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]


def dlogits_pitch(valid: int) -> int:
    """Columns from one row of the logits' gradient to the next: whole vectors of 16 bytes."""
    return ceil_div(valid, 8) * 8


@remembered
def fwd_config(
    width: int, valid: int, dtype: torch.dtype, plain: bool, device: torch.device
) -> Config:
    """16 K fp32 logits over 4 warps, twice as many with bias, class weights or smoothing."""
    default = _rows_default(width, valid, dtype, device, 0)
    name = _bucket(width, valid, dtype) if plain else f"{_bucket(width, valid, dtype)}-options"
    if not plain:
        default["num_warps"] = 8
    return config_for("linear_logprobs_fwd", name, default, device)


@remembered
def mean_config(programs: int, device: torch.device) -> Config:
    """One program adds what all others of the forward have summed."""
    default = {"BLOCK": 512, "num_warps": 4}
    return config_for("linear_logprobs_mean", amount(programs), default, device)


@remembered
def dlogits_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The forward's block of rows over twice the warps: the gradient needs registers as well."""
    default = _rows_default(width, valid, dtype, device, valid * dtype.itemsize)
    default["num_warps"] = 8
    if gpu_of(device).arch != 90:  # whose products take fewer registers
        default["BLOCK_N"] = min(64, default["BLOCK_N"])
    return config_for("linear_logprobs_dlogits", _bucket(width, valid, dtype), default, device)


def _rows_default(
    width: int, valid: int, dtype: torch.dtype, device: torch.device, result_bytes: int
) -> Config:
    """Blocks of rows with the table in shared memory where it fits beside them and their results;
    elsewhere the table streams past as many rows as the registers hold."""
    main, tail = vocab_blocks(valid)
    if dtype == torch.float32:
        rows = max(16, min(64, 8192 // main))
        return {"BLOCK_N": rows, "BLOCK_D": block_of(width, 32), "PROGRAMS": 2 * PROGRAMS,
                "num_warps": 8}  # fmt: skip
    shared, whole = gpu_of(device).shared_bytes, block_of(width, 256)
    rows = 64 if main <= 256 else 32
    table, block = 2 * whole * (main + tail), 2 * whole * rows
    stages = (shared - SPARE_BYTES - table - result_bytes * rows) // block
    if width <= 256 and main <= 256 and stages >= 1:
        small = 2 * (table + block * min(stages, 2)) <= shared
        return {"BLOCK_N": rows, "BLOCK_D": whole, "PROGRAMS": (1 + small) * PROGRAMS,
                "num_warps": 4, "num_stages": min(stages, 2)}  # fmt: skip
    wide = 2 * (2 * 64 * (main + tail + 2 * rows)) <= shared - SPARE_BYTES
    return {"BLOCK_N": (1 + wide) * rows, "BLOCK_D": block_of(width, 64), "PROGRAMS": 2 * PROGRAMS,
            "num_warps": 8, "num_stages": 2}  # fmt: skip


@remembered
def bwd_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The table's gradient takes half the registers of 8 warps; 32 rows leave room for the rest."""
    default = {
        "BLOCK_N": 32, "BLOCK_D": block_of(width, 128), "PROGRAMS": PROGRAMS, "num_warps": 8,
        "num_stages": 2,
    }  # fmt: skip
    return config_for("linear_logprobs_bwd", _bucket(width, valid, dtype), default, device)


@remembered
def bwd_weight_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """All columns by BLOCK_W of D stay in registers while a program walks its rows."""
    main, _ = vocab_blocks(valid)
    default = {
        "BLOCK_N": 32,
        "BLOCK_W": block_of(width, max(16, min(128, 32_768 // main))),
        "PROGRAMS": PROGRAMS,
        "num_warps": 8,
        "num_stages": 3 if main <= 256 else 2,
    }
    if gpu_of(device).arch != 90:
        default["BLOCK_W"] = min(64, default["BLOCK_W"])
    if dtype == torch.float32:
        wide = block_of(width, max(16, min(64, 8192 // main)))
        default |= {"BLOCK_N": 16, "BLOCK_W": wide, "num_stages": 2}
    return config_for("linear_logprobs_bwd_weight", _bucket(width, valid, dtype), default, device)


def _bucket(width: int, valid: int, dtype: torch.dtype) -> str:
    main, tail = vocab_blocks(valid)
    return width_bucket(width, f"V{main}+{tail}", dtype)
