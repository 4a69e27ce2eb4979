"""Limits of the qkv_rope kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, bucket, ceil_div, config_for, gpu_of, width_bucket

MOST_WIDTH, MOST_DIM = 128, 1024
"""Columns of a head, and of x, that the kernels take."""
GOOD_DIM = 512
"""Columns of x up to which the weight is read again for each block of rows at less than the
composition pays for what it writes and reads again."""


def unsupported_reasons(*, x: Tensor, cos: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("x", x)
    if 2 * cos.shape[1] > MOST_WIDTH:
        reasons.append(f"heads are {2 * cos.shape[1]} wide; the kernels take up to {MOST_WIDTH}")
    if x.shape[-1] > MOST_DIM:
        reasons.append(f"x has {x.shape[-1]} columns; the kernels take up to {MOST_DIM}")
    return reasons


def declined_reasons(*, x: Tensor, **_: Any) -> list[str]:
    """List the reasons to prefer the ops one by one; nothing warns of them."""
    if x.shape[-1] <= GOOD_DIM:
        return []
    return [
        f"x has {x.shape[-1]} columns; above {GOOD_DIM} reading the weight for each block of rows "
        "costs more than the ops one by one write and read again"
    ]


def width_block(width: int) -> int:
    return max(32, block_of(width, MOST_WIDTH))


def rows_config(
    kernel: str, tokens: int, dim: int, width: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """`BLOCK` rows of a program and `BLOCK_D` columns of x at a time."""
    small = gpu_of(device).shared_bytes < 128 * 1024
    if dtype.itemsize == 4:  # no matrix unit: products hold their operands in registers
        default = {"BLOCK": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    else:
        default = {"BLOCK": 64 if small else 128, "BLOCK_D": block_of(dim, 64 if small else 256)}
        default |= {"num_warps": 4 if small else 8, "num_stages": 2}
    shape = bucket(f"D{block_of(dim, 1024)}", f"K{width_block(width)}", amount(tokens * dim), dtype)
    return config_for(f"qkv_rope_{kernel}", shape, default, device)


def heads_of_program(tokens: int, block: int, heads: int) -> int:
    """All heads, or fewer where so few blocks of rows would leave much of a GPU idle."""
    blocks = max(1, ceil_div(tokens, block))
    groups = min(heads, max(1, 132 // blocks))
    return ceil_div(heads, groups)


def norm_config(dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Rows that a program of `bwd_norm` takes at a time, and how many `PROGRAMS` walk them."""
    width = block_of(dim, MOST_DIM)
    default = {"BLOCK": max(1, 4096 // width), "PROGRAMS": 4 * 132, "num_warps": 4}
    return config_for("qkv_rope_bwd_norm", width_bucket(dim, dtype), default, device)
