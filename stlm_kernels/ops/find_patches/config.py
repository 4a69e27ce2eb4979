"""Limits of the find_patches kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch

from ..._launch import Config, config_for

SMALL = 65_536
"""Bytes up to which smaller blocks are needed to reach every SM."""


def unsupported_reasons(**_: Any) -> list[str]:
    """List no reason: the kernels take every call."""
    return []


def write_config(how: str, total: int, device: torch.device) -> Config:
    """Bytes of a program, in both passes over bytes: what one counts, the other one goes on from.

    8 bytes to a thread make a quarter of the instructions of 2: sums and scans across lanes are
    paid once for all.
    """
    default = {"BLOCK": 256 if total <= SMALL else 1024, "num_warps": 2 if total <= SMALL else 4}
    size = "small" if total <= SMALL else "large"
    return config_for("find_patches_write", f"{how}-{size}", default, device)


def pitch_of(blocks: int) -> int:
    """Numbers in a row of notes, one more than there are blocks, so that rows are aligned."""
    return -(-(blocks + 1) // 32) * 32


def carry_config(blocks: int, device: torch.device) -> Config:
    """Blocks that the one program of the scan takes at a time."""
    few = blocks <= 256
    default = {"BLOCK": 256 if few else 1024, "num_warps": 4}
    return config_for("find_patches_carry", "few" if few else "many", default, device)
