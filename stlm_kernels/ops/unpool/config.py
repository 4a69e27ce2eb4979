"""Limits of the unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for

PROGRAMS = 4 * 132
"""Programs that sum the null state's gradient: four for each SM of an H100."""


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    if patch_states.dtype not in _checks.KERNEL_FLOATS:
        return [
            f"patch_states is {patch_states.dtype}; the kernels take float32, bfloat16 and float16"
        ]
    return []


def fwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Rows are written whole; the patch rows they repeat come from the cache."""
    # Four warps spill on sm_100 where fp32 rows are added under autocast.
    warps = 8 if width > 64 else 4
    default = {"BLOCK_T": 32, "BLOCK_D": block_of(width, 128), "num_warps": warps}
    bucket = f"D{block_of(width, 1024)}-{str(dtype).removeprefix('torch.')}"
    return config_for("unpool_fwd", bucket, default, device)
