"""Limits of the byte_pool kernels, and the configuration each is launched with. Pure Python."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for, remembered, width_bucket

COUNT_CHUNK = 256
"""Slots counted at a time: bfloat16 holds whole numbers exactly up to 256."""

TARGET_PROGRAMS = 264
"""Programs of a split reduction on an untuned device: two for each SM of an H100."""


def unsupported_reasons(
    *,
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    mode: str = "mean",
    position_weight: Tensor | None = None,
) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("weight", weight)


@remembered
def fwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One warp, one patch at a time: no patch waits for a longer one."""
    default = {"BLOCK_D": block_of(width, 256), "PATCHES": 16, "num_warps": 1}
    return config_for("byte_pool_fwd", width_bucket(width, dtype), default, device)


@remembered
def bwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Half the rows of a byte table each: blocks of pure ASCII skip the upper half."""
    default = {
        "BLOCK_V": 128,
        "BLOCK_P": 64,
        "BLOCK_D": block_of(width, 128),
        "PROGRAMS": TARGET_PROGRAMS,
        "num_warps": 8,
    }
    if dtype == torch.float32:
        # Products of fp32 tiles run on the ordinary cores and keep both operands in registers.
        default |= {"BLOCK_V": 64, "BLOCK_P": 32, "BLOCK_D": block_of(width, 64)}
    return config_for("byte_pool_bwd", width_bucket(width, dtype), default, device)


@remembered
def bwd_gain_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Correct first: this gradient has no speed target."""
    default = {
        "BLOCK_V": 64,
        "BLOCK_P": 32,
        "BLOCK_D": block_of(width, 64),
        "PROGRAMS": TARGET_PROGRAMS,
        "num_warps": 4,
    }
    if dtype == torch.float32:
        default["BLOCK_V"] = 32
    return config_for("byte_pool_bwd_gain", width_bucket(width, dtype), default, device)
