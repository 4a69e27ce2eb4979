"""Limits of the ema_unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for, width_bucket


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("patch_states", patch_states)


def smooth_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One warp walks 32 patches; their look-back is mostly of two blocks."""
    default = {"BLOCK_P": 32, "BLOCK_D": block_of(width, 128), "LOOK": 16, "num_warps": 1}
    return config_for("ema_unpool_smooth", width_bucket(width, dtype), default, device)


def bwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    return config_for("ema_unpool_bwd", width_bucket(width, dtype), default, device)
