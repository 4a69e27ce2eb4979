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


def fwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """32 rows are about 6 patches, whose states one look-back of 16 serves."""
    default = {"BLOCK_T": 32, "BLOCK_D": block_of(width, 128), "LOOK": 16, "num_warps": 4}
    return config_for("ema_unpool_fwd", _bucket(width, dtype), default, device)


def bwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """A program holds the sums and the states, of this dtype, of its patches together."""
    warps = 8 if dtype == torch.float32 else 4  # four spill on sm_80
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "LOOK": 16, "num_warps": warps}
    return config_for("ema_unpool_bwd", _bucket(width, dtype), default, device)


def _bucket(width: int, dtype: torch.dtype) -> str:
    return f"D{block_of(width, 1024)}-{str(dtype).removeprefix('torch.')}"
