"""What the attention_pool kernels take, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ..._launch import Config, config_for

LEAST_WIDTH, MOST_WIDTH = 8, 128
MOST_QUERIES = 4096
"""Elements of the queries that share a key head: what one program holds of each patch."""


def unsupported_reasons(*, query: Tensor, key: Tensor, **_: Any) -> list[str]:
    """Why the kernels cannot take this call; empty if they can."""
    reasons = []
    if key.dtype not in _checks.KERNEL_FLOATS:
        reasons.append(f"key is {key.dtype}; the kernels take float32, bfloat16 and float16")
    kv_heads, width = key.shape[1:]
    if not LEAST_WIDTH <= width <= MOST_WIDTH or width % 8:
        reasons.append(
            f"heads are {width} wide; the kernels take multiples of 8 "
            f"from {LEAST_WIDTH} to {MOST_WIDTH}"
        )
    group = query.shape[-2] // kv_heads
    if _power(group) * _power(width) > MOST_QUERIES:
        reasons.append(
            f"{group} queries of width {width} share a key head; the kernels take {MOST_QUERIES} "
            "elements, each number rounded up to a power of two"
        )
    return reasons


def pool_config(
    kernel: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Config:
    """`ROWS` rows of key at a time, `BLOCK_H` key heads of each.

    One warp, so that no sum over the bytes of a patch crosses warps: whole rows of 128 elements are
    read in full lines, and 16 of them in flight are enough.

    Args:
        kernel: "fwd" or "bwd".
        shape: (T, P, H, H_kv, K).
    """
    _, _, heads, kv_heads, width = shape
    group, block = _power(heads // kv_heads), _power(width)
    lanes = group * block
    side_by_side = min(_power(kv_heads), max(1, 128 // lanes))
    budget = 2048 if kernel == "fwd" else 1024
    default = {
        "ROWS": max(1, budget // (side_by_side * lanes)),
        "BLOCK_H": side_by_side,
        "num_warps": max(1, lanes // 1024),
    }
    if kernel == "bwd":
        default["PROGRAMS"] = 4096
    bucket = f"G{group}-K{block}-{str(dtype).removeprefix('torch.')}"
    return config_for(f"attention_pool_{kernel}", bucket, default, device)


def tile_shape(rows: int, total: int, patches: int) -> tuple[int, int]:
    """(patches, bytes of each) that make a tile of `rows`: as many bytes as patches have on
    average, so that most patches are over in one or two steps."""
    slots = min(rows, _power(max(1, total // max(1, patches))))
    return rows // slots, slots


def width_block(width: int) -> int:
    return _power(width)


def group_block(heads: int, kv_heads: int) -> int:
    return _power(heads // kv_heads)


def _power(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()
