"""Limits of the segment_pool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, config_for, width_bucket


def unsupported_reasons(*, x: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("x", x)


def pick_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Patches of a program side by side, so that ragged lengths share one walk."""
    warps = 8 if dtype == torch.float32 else 4  # four spill on sm_100
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": warps}
    default["PART_ROWS"] = 512  # a longer patch is cut
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("segment_pool_pick", shape, default, device)


def pick_long_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """`BLOCK_T` rows of a long patch at a time, and as many of its parts."""
    default = {"BLOCK_T": 16, "BLOCK_D": block_of(width, 128), "num_warps": 8}
    return config_for("segment_pool_pick_long", width_bucket(width, dtype), default, device)


def bwd_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Configuration by rows, not by patches: one long patch does not hold a program up."""
    rows = 128 if width <= 128 else 64  # narrow rows are over sooner than the search for the first
    default = {"BLOCK_T": rows, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("segment_pool_bwd", shape, default, device)
