"""Limits of the byte_pool kernels, and the configuration each is launched with. Pure Python."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, block_of, config_for, gpu_of, remembered, width_bucket

LONG = 256
"""A patch of more bytes takes tiles of its own, in columns of 32 bytes."""

PATCH_WORK = 32
"""Bytes that a patch is worth where work is shared out, as in the kernel: it takes a column."""

WORK_BLOCK = 64
"""Work of a share is a multiple of this."""

MUCH_WORK = 1 << 20
"""Work from which a program may own whole rows of a narrow table."""

ALONE = 64
"""A patch of more bytes is pooled by itself in the forward's product, 32 bytes in a row."""

REST_ROWS = 16
"""Rows from 256 on that the forward's product takes at a time: more spill on sm_90."""

TARGET_PROGRAMS = 264
"""Programs of a split reduction on an untuned device: two for each SM of an H100."""


def unsupported_reasons(
    *,
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    mode: str = "mean",
    position_weight: Tensor | None = None,
) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return _checks.dtype_reasons("weight", weight)


@remembered
def fwd_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """One warp, one patch at a time: no patch waits for a longer one.

    One of more than `PART_ROWS` bytes is cut, at least where there are 2,048 parts.
    """
    default = {"BLOCK_D": block_of(width, 256), "PATCHES": 16, "num_warps": 1, "PART_ROWS": 512}
    return config_for("byte_pool_fwd", width_bucket(width, dtype), default, device)


def takes_product(vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the forward is a product of counts and table, in the result's dtype.

    That pays in 16 bits, where 256 rows serve most bytes, and where an operand of products lies in
    shared memory while many are made: on sm_80 and sm_120 each warp would load it again. Rows
    from 256 on are few, for special tokens: their bytes are counted anew for each `REST_ROWS`.
    """
    few_rows = vocab <= 256 + 4 * REST_ROWS
    return dtype != torch.float32 and few_rows and gpu_of(device).arch // 10 in (9, 10)


@remembered
def product_config(width: int, checked: bool, dtype: torch.dtype, device: torch.device) -> Config:
    """Two programs for each SM of an H100. `PART_ROWS` as above.

    Checks of ids, and rows from 256 on, take registers of twice the warps, which have twice the
    patches: one program for each SM.
    Columns of twice the width would count bytes half as often, but spill.
    """
    default = {
        "BLOCK_P": 128 if checked else 64,
        "BLOCK_D": block_of(width, 128),
        "PROGRAMS": TARGET_PROGRAMS // 2 if checked else TARGET_PROGRAMS,
        "num_warps": 8 if checked else 4,
        "PART_ROWS": 2048,
    }
    bucket = width_bucket(width, dtype, "checked" if checked else "bytes")
    return config_for("byte_pool_fwd_product", bucket, default, device)


def work_of(total: int, patches: int) -> int:
    """Units of work in all patches together, at most."""
    return total + PATCH_WORK * (patches + 1)


@remembered
def bwd_config(width: int, much: bool, dtype: torch.dtype, device: torch.device) -> Config:
    """A program owns all rows of a byte table, with fewer columns where there is little work.

    Partial sums are as many as the splits: two programs for each SM of an H100 where few splits
    make them, else one. `much`: MUCH_WORK or more.
    """
    block_d = block_of(width, 128 if much else max(32, min(64, width // 4)))
    default = {
        "BLOCK_V": 256,
        "BLOCK_P": 64,
        "BLOCK_D": block_d,
        "PROGRAMS": TARGET_PROGRAMS // 2 if much else TARGET_PROGRAMS,
        "num_warps": 8,
    }
    if dtype == torch.float32:
        # Products of fp32 tiles run on the ordinary cores and keep both operands in registers.
        default |= {"BLOCK_V": 64, "BLOCK_P": 32, "BLOCK_D": min(64, block_d)}
        default["PROGRAMS"] = TARGET_PROGRAMS
    bucket = width_bucket(width, dtype, "much" if much else "little")
    return config_for("byte_pool_bwd", bucket, default, device)


@remembered
def bwd_gain_config(width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Correct first: this gradient has no speed target."""
    default = {
        "BLOCK_V": 64,
        "BLOCK_P": 32,
        "BLOCK_D": block_of(width, 64),
        "PROGRAMS": TARGET_PROGRAMS,
        "num_warps": 4,
    }
    if dtype == torch.float32:
        default["BLOCK_V"] = 32
    return config_for("byte_pool_bwd_gain", width_bucket(width, dtype), default, device)
