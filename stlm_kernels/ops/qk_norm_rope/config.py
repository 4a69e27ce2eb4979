"""Limits of the qk_norm_rope kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, bucket, config_for

MOST_WIDTH = 256
TILE_BYTES = {"fwd": 8192, "bwd": 1024}
"""Bytes of q or k that a program takes at a time; the backward holds three such tiles and sums."""


def unsupported_reasons(*, q: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("q", q)
    if q.shape[-1] > MOST_WIDTH:
        reasons.append(f"heads are {q.shape[-1]} wide; the kernels take up to {MOST_WIDTH}")
    return reasons


def width_block(width: int) -> int:
    return block_of(width, MOST_WIDTH)


def rows_config(
    kernel: str, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """`BLOCK` heads of tokens, one after the other in memory, that a program takes at a time.

    `PROGRAMS` of the backward, each with sums of weight gradients: sixteen for each SM of an H100,
    of one warp, which adds them up without shared memory.
    """
    block = width_block(width)
    default = {"BLOCK": TILE_BYTES[kernel] // (block * dtype.itemsize), "num_warps": 4}
    if kernel == "bwd":
        default |= {"PROGRAMS": 16 * 132, "num_warps": 1}
    shape = bucket(f"K{block}", amount(rows * width), dtype)
    return config_for(f"qk_norm_rope_{kernel}", shape, default, device)
