"""Limits of the ema_unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    if patch_states.dtype not in _checks.KERNEL_FLOATS:
        return [
            f"patch_states is {patch_states.dtype}; the kernels take float32, bfloat16 and float16"
        ]
    return []


def smooth_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One warp walks 32 patches; their look-back is mostly of two blocks."""
    default = {"BLOCK_P": 32, "BLOCK_D": block_of(width, 128), "LOOK": 16, "num_warps": 1}
    return config_for("ema_unpool_smooth", _bucket(width, dtype), default, device)


def bwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    return config_for("ema_unpool_bwd", _bucket(width, dtype), default, device)


def _bucket(width: int, dtype: torch.dtype) -> str:
    return f"D{block_of(width, 1024)}-{str(dtype).removeprefix('torch.')}"
