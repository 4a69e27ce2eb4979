"""Limits of the ngram_embedding kernels, and the configuration each is launched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, block_of, ceil_div, config_for, width_bucket

DEFAULT_MULTIPLIER = 1_000_000_007
"""Multiplier of the rolling hash where none is given: that of BLT's first hash function."""


def unsupported_reasons(*, tables: Sequence[Tensor], **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("tables[0]", tables[0])
    longest = max(len(table) for table in tables)
    if longest >= 2**31:
        reasons.append(f"a table has {longest} rows; the kernels take fewer than 2^31")
    return reasons


def fwd_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """32 sums a thread; narrow tables take more bytes at a time."""
    block_d = block_of(width, 128)
    default = {"BLOCK_T": 4096 // block_d, "BLOCK_D": block_d, "num_warps": 4}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("ngram_embedding_fwd", shape, default, device)


def keys_config(total: int, device: torch.device) -> Config:
    default = {"BLOCK": 512, "num_warps": 4}
    return config_for("ngram_embedding_keys", amount(total), default, device)


def bwd_heads_config(total: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One run at a time, as much of it as a tile of one warp holds.

    `CHUNK`: sorted bytes whose leading run is summed ahead, so that no program of `bwd` walks a
    frequent n-gram.
    """
    block_d = block_of(width, 128)
    default = {"CHUNK": 256, "BLOCK_K": 2048 // block_d, "BLOCK_D": block_d, "num_warps": 1}
    shape = width_bucket(width, amount(total * width), dtype)
    return config_for("ngram_embedding_bwd_heads", shape, default, device)


def bwd_config(
    total: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """A tile has room for about one average run of each of its rows, in one warp."""
    block_d = block_of(width, 128)
    default = {"SLOTS": 2048 // block_d, "BLOCK_D": block_d, "num_warps": 1}
    shape = width_bucket(width, amount(total * width), dtype)
    config = config_for("ngram_embedding_bwd", shape, default, device)
    slots = config.pop("SLOTS")
    average = 1 << (ceil_div(total, rows) - 1).bit_length()
    block_k = min(slots, max(4, average))
    return config | {"BLOCK_P": slots // block_k, "BLOCK_K": block_k}
