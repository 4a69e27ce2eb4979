"""Limits of the decode_attention kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._launch import Config, block_of, bucket, config_for, gpu_of, remembered
from ..._launch import splits as cut
from ..patch_attention import config as patch_attention

MOST_SPLITS = 64
"""The combining kernel holds the results of all splits of a head at once."""
MOST_HEADS = 64
"""Query heads of one key head that a program takes."""
WHOLE = 2
"""Blocks of a cache that stay one part: a second launch for one block more would not pay."""
TILE_BYTES = 8 * 1024
"""Bytes of a cache at a time: three stages of both caches leave room for four programs on an SM."""

width_block = patch_attention.width_block


def unsupported_reasons(*, q: Tensor, k_cache: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    return patch_attention.unsupported_reasons(q=q, k=k_cache.transpose(1, 2))


def heads_block(group: int) -> int:
    """Query heads side by side: the rows of the products, of which there are at least 16."""
    return block_of(group, MOST_HEADS)


@remembered
def fwd_config(
    width: int, work: str, stored: torch.dtype, dot: torch.dtype, device: torch.device
) -> Config:
    """`BLOCK` entries of the cache that a program takes at a time; `work`: `amount` of the cache.

    A short cache is cut until `PROGRAMS` work on it: two for each SM of an H100.
    """
    block = width_block(width)
    warps = 8 if block == 64 and gpu_of(device).arch < 90 else 4  # four spill there
    default = {
        "BLOCK": block_of(TILE_BYTES // (block * stored.itemsize), 128),
        "PROGRAMS": 2 * 132,
        "num_warps": warps,
        "num_stages": 3,
    }
    shape = bucket(f"K{block}", work, stored, dot)
    return config_for("decode_attention_fwd", shape, default, device)


@remembered
def combine_config(width: int, device: torch.device) -> Config:
    default = {"num_warps": 4}
    return config_for("decode_attention_combine", bucket(f"K{width_block(width)}"), default, device)


def split_count(span: int, tiles: int, block: int, programs: int) -> int:
    """Number of parts of a cache: by shapes alone, so that a captured graph stays valid.

    Args:
        span: most entries that a query may see.
        tiles: programs for one part of every cache.
        block: entries that a program takes at a time.
        programs: how many occupy the device.
    """
    if span <= WHOLE * block:
        return 1
    return cut(span, tiles, min(programs, tiles * MOST_SPLITS), block)[0]
