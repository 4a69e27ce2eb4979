"""Limits of the linear_logprobs kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, bucket, ceil_div, config_for, remembered, width_bucket

MAX_VOCAB = 512
"""Up to here a row of logits fits on the chip."""

SCRATCH_BYTES = 256 << 20
"""Bytes of fp32 logits at a time above MAX_VOCAB; the gradient's fp32 table comes on top."""

PROGRAMS = 132
"""Runs of rows that the weight gradient is summed in: one for each SM of an H100."""


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


@remembered
def fwd_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """16 K fp32 accumulators over 8 warps; twice as many spill (ahead-of-time lane, sm_90)."""
    main, _ = vocab_blocks(valid)
    default = {
        "BLOCK_N": max(16, min(128, 16_384 // main)),
        "BLOCK_D": block_of(width, 64),
        "num_warps": 8,
    }
    if dtype == torch.float32:
        default |= {"BLOCK_N": max(16, min(64, 8192 // main)), "BLOCK_D": block_of(width, 32)}
    return config_for("linear_logprobs_fwd", _bucket(width, valid, dtype), default, device)


@remembered
def bwd_rows_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Half the forward's rows: the gradient tile lives beside the logits."""
    main, _ = vocab_blocks(valid)
    default = {
        "BLOCK_N": max(16, min(64, 8192 // main)),
        "BLOCK_D": block_of(width, 64),
        "num_warps": 8,
    }
    if dtype == torch.float32:
        # The forward's steps: then its logits are formed again to the bit, and one column has a
        # gradient of exactly 0.
        default |= {"BLOCK_N": 16, "BLOCK_D": block_of(width, 32), "num_stages": 1}
    return config_for("linear_logprobs_bwd_rows", _bucket(width, valid, dtype), default, device)


@remembered
def bwd_weight_config(width: int, valid: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The weight gradient's tile, 128 x 128 or as large, stays in registers while a program walks
    its rows. Each column block of D forms the logits of its rows again, so wide tables take few:
    64 table rows are the least a Hopper product takes; 512 columns spill where there is a bias.
    """
    default = {
        "BLOCK_N": 32,
        "BLOCK_D": block_of(width, 64),
        "BLOCK_W": block_of(width, 256),
        "BLOCK_V": 128 if width <= 128 else 64,
        "PROGRAMS": PROGRAMS,
        "num_warps": 8,
    }
    if dtype == torch.float32:
        default |= {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_W": block_of(width, 32), "BLOCK_V": 64}
    return config_for("linear_logprobs_bwd_weight", _bucket(width, valid, dtype), default, device)


def _bucket(width: int, valid: int, dtype: torch.dtype) -> str:
    main, tail = vocab_blocks(valid)
    return width_bucket(width, f"V{main}+{tail}", dtype)
