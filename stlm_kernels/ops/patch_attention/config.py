"""Limits of the patch_attention kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, bucket, config_for

LEAST_WIDTH, MOST_WIDTH = 16, 128
SHORT = 16
"""Patches of up to so many rows, on average, take tiles of whole patches."""
MANY = 32_768
"""Rows from which windows alone, each with all heads, fill a GPU."""


def unsupported_reasons(*, q: Tensor, k: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("q", q)
    heads, width = q.shape[1:]
    if not LEAST_WIDTH <= width <= MOST_WIDTH or width % 8:
        reasons.append(
            f"heads are {width} wide; the kernels take multiples of 8 "
            f"from {LEAST_WIDTH} to {MOST_WIDTH}"
        )
    if k.shape[1] < 1 or heads % k.shape[1]:
        reasons.append(f"{heads} query heads do not share {k.shape[1]} key heads evenly")
    return reasons


def width_block(width: int) -> int:
    """Heads of 48 stand in a block of 64 with its tail masked: memory, not the products, limits."""
    return block_of(width, MOST_WIDTH)


def is_short(total: int, patches: int, width: int) -> bool:
    """Return whether patches are, on average, up to `SHORT` rows long: a tile then holds whole
    ones, if heads are so narrow that their gradients fit the registers beside it."""
    return total <= SHORT * patches and width <= 64


def windows_config(
    kernel: str, width: int, total: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """`WINDOW` rows whose patches a program owns, `TILE` rows that it takes at a time, `KV_HEADS`
    key heads, or the largest part that divides those there are.

    Two patches of 12 bytes fill a window of 24 rows and most of a tile of 32; words of up to 16
    mostly fit as well. Few rows spread their heads over programs, so that every SM has some.
    Fewer warps spill in the backward; more have barriers to wait at.
    """
    block = width_block(width)
    many = total >= MANY
    default = {"WINDOW": 24, "TILE": 32, "KV_HEADS": 1 << 16 if many else 1}
    warps = {16: 1, 32: 2 if kernel == "short_bwd" else 1, 64: 4}[block]
    default |= {"num_warps": warps, "num_stages": 1 if block == 64 else 2}
    if dtype == torch.float32:
        default |= {"num_warps": 8 if kernel == "short_bwd" else 4, "num_stages": 1}
    shape = bucket(f"K{block}", "many" if many else "few", dtype)
    return dict(config_for(f"patch_attention_{kernel}", shape, default, device))


def rows_config(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """`BLOCK` rows that a program owns, `INNER` rows of the other side that it takes at a time.

    A long patch is read once for every tile, which is worth 64 rows, the least a Hopper product
    takes. Products in fp32 run without tensor cores and hold their operands in registers. Wide
    heads spill on 4 warps, or with a second stage in flight, without which three programs instead
    of two fit an SM in bwd_kv of 64 columns.
    """
    block = width_block(width)
    default = {"BLOCK": 64, "INNER": 32, "num_warps": 4, "num_stages": 2}
    if block == 128:
        inner = 16 if kernel == "bwd_q" else 32
        default |= {"INNER": inner, "num_warps": 8, "num_stages": 1}
    if block == 64 and kernel == "bwd_kv":
        default |= {"num_stages": 1}
    if dtype == torch.float32:
        default = {"BLOCK": 32, "INNER": 16, "num_warps": 8 if block >= 64 else 4, "num_stages": 1}
        if block == 128 and kernel == "bwd_q":
            default |= {"BLOCK": 16, "INNER": 32}
        if block == 64 and kernel == "bwd_kv":
            default |= {"INNER": 32}
    shape = bucket(f"K{block}", dtype)
    return config_for(f"patch_attention_{kernel}", shape, default, device)
