"""Limits of the ema_unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, config_for, width_bucket


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("patch_states", patch_states)


def links_config(patches: int, device: torch.device) -> Config:
    default = {"BLOCK": 256, "num_warps": 4}
    return config_for("ema_unpool_links", amount(patches), default, device)


def smooth_config(patches: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One warp walks 32 patches; their look-back is mostly of two blocks."""
    default = {"BLOCK_P": 32, "BLOCK_D": block_of(width, 128), "LOOK": 16, "num_warps": 1}
    shape = width_bucket(width, amount(patches * width), dtype)
    return config_for("ema_unpool_smooth", shape, default, device)


def bwd_config(patches: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": 8}
    shape = width_bucket(width, amount(patches * width), dtype)
    return config_for("ema_unpool_bwd", shape, default, device)
