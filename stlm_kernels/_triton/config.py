"""Configurations of the kernels that ops share."""

from __future__ import annotations

import torch

from .._launch import Config, amount, block_of, config_for, remembered, width_bucket


def sum_splits_config(splits: int, size: int, device: torch.device) -> Config:
    """Up to `BLOCK_S` splits of a tile of `TILE` numbers at a time.

    One warp holds all of them: sums across warps would meet in one bank of shared memory. Many
    results give it whole lines of one split, few of them 32 splits at a time.
    """
    work = amount(splits * size)
    default = {"BLOCK_S": 8 if work == "large" else 32, "TILE": 1024, "num_warps": 1}
    config = config_for("sum_splits", work, default, device)
    at_once = min(config.pop("BLOCK_S"), 1 << (splits - 1).bit_length())
    return config | {"BLOCK_S": at_once, "BLOCK": config.pop("TILE") // at_once}


def segment_sum_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Segments of a program side by side, so that ragged lengths share one walk."""
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("segment_sum", shape, default, device)


def part_rows_for(total: int, least: int) -> int:
    """Rows of a part of long segments: `least`, or so many that there are at most 2,048 parts."""
    return max(least, 1 << (max(total, 1) - 1 >> 11).bit_length())


def segment_sum_long_config(
    total: int, width: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """A program adds the rows of a part, at least `PART_ROWS`, `BLOCK_T` at a time."""
    default = {"PART_ROWS": 512, "BLOCK_T": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    config = config_for("segment_sum_long", width_bucket(width, dtype), default, device)
    return config | {"PART_ROWS": part_rows_for(total, config["PART_ROWS"])}


def long_segments_config(width: int, device: torch.device) -> Config:
    """A program looks at `PARTS` parts, and adds sums of `BLOCK_S` at a time."""
    default = {"PARTS": 16, "BLOCK_S": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    return config_for("long_segments", width_bucket(width), default, device)


@remembered
def row_bounds_config(total: int, device: torch.device) -> Config:
    default = {"BLOCK": 256, "num_warps": 4}
    return config_for("row_bounds", amount(total), default, device)
