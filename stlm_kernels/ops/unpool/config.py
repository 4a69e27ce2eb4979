"""Limits of the unpool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, config_for, width_bucket


def unsupported_reasons(*, patch_states: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("patch_states", patch_states)


def fwd_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Rows are written whole; the patch rows they repeat come from the cache."""
    # Four warps spill on sm_100 where fp32 rows are added under autocast.
    warps = 8 if width > 64 else 4
    default = {"BLOCK_T": 32, "BLOCK_D": block_of(width, 128), "num_warps": warps}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("unpool_fwd", shape, default, device)


def runs_config(total: int, device: torch.device) -> Config:
    """One id a thread: three neighbours loaded by one thread would be loads of scattered bytes."""
    default = {"BLOCK": 128, "num_warps": 4}
    return config_for("unpool_runs", amount(total), default, device)


def bwd_null_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Ids are scanned `SCAN` at a time, and rows added `BLOCK_T` at a time where some read nothing.

    `PROGRAMS`, before the sums are added up: four for each SM of an H100. Of one warp each, so
    that its rows are added up without shared memory.
    """
    default = {
        "SCAN": 1024,
        "BLOCK_T": 16,
        "BLOCK_D": block_of(width, 128),
        "PROGRAMS": 4 * 132,
        "num_warps": 1,
    }
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("unpool_bwd_null", shape, default, device)
