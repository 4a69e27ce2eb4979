"""Limits of the unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for, width_bucket

PROGRAMS = 4 * 132
"""Programs that sum the null state's gradient: four for each SM of an H100."""


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("patch_states", patch_states)


def fwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Rows are written whole; the patch rows they repeat come from the cache."""
    # Four warps spill on sm_100 where fp32 rows are added under autocast.
    warps = 8 if width > 64 else 4
    default = {"BLOCK_T": 32, "BLOCK_D": block_of(width, 128), "num_warps": warps}
    return config_for("unpool_fwd", width_bucket(width, dtype), default, device)
