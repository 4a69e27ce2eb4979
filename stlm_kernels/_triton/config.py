"""Configurations of the kernels that ops share."""

from __future__ import annotations

import torch

from .._launch import Config, amount, block_of, config_for, width_bucket


def sum_splits_config(splits: int, size: int, device: torch.device) -> Config:
    """Up to 32 splits added at a time, and 32 numbers loaded by each thread."""
    default = {"BLOCK_S": 32, "TILE": 4096, "num_warps": 4}
    config = config_for("sum_splits", amount(splits * size), default, device)
    at_once = min(config.pop("BLOCK_S"), 1 << (splits - 1).bit_length())
    return config | {"BLOCK_S": at_once, "BLOCK": config.pop("TILE") // at_once}


def segment_sum_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Segments of a program side by side, so that ragged lengths share one walk."""
    default = {"BLOCK_P": 16, "BLOCK_D": block_of(width, 128), "num_warps": 4}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("segment_sum", shape, default, device)


def row_bounds_config(total: int, device: torch.device) -> Config:
    default = {"BLOCK": 256, "num_warps": 4}
    return config_for("row_bounds", amount(total), default, device)
