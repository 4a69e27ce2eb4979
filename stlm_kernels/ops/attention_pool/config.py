"""Limits of the attention_pool kernels, and the configuration each is launched with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _checks
from ..._launch import Config, amount, bucket, config_for

LEAST_WIDTH, MOST_WIDTH = 8, 128
MOST_QUERIES = 2048
"""Elements of the queries that share a key head: what one program holds of each patch."""


def unsupported_reasons(*, query: Tensor, key: Tensor, **_: Any) -> list[str]:
    """List the reasons why the kernels cannot take this call; empty if they can."""
    reasons = _checks.dtype_reasons("key", key)
    kv_heads, width = key.shape[1:]
    if not LEAST_WIDTH <= width <= MOST_WIDTH or width % 8:
        reasons.append(
            f"heads are {width} wide; the kernels take multiples of 8 "
            f"from {LEAST_WIDTH} to {MOST_WIDTH}"
        )
    group = query.shape[-2] // kv_heads
    if power_above(group) * power_above(width) > MOST_QUERIES:
        reasons.append(
            f"{group} queries of width {width} share a key head; the kernels take {MOST_QUERIES} "
            "elements, each number rounded up to a power of two"
        )
    return reasons


def pool_config(kernel: str, heads: int, key: Tensor) -> Config:
    """`ROWS` rows of key at a time, `BLOCK_H` key heads of each; the backward's most `PROGRAMS`,
    whose sums of a shared query are added up `FOLD` at a time.

    Few warps, so that sums over the bytes of a patch stay within one: 128 neighbouring elements are
    read in full lines, and 8 such rows of 16 bits in flight in each of many small programs occupy
    the memory; of 32 bits it is 4, and 8 spill.
    """
    (_, kv_heads, width), dtype = key.shape, key.dtype
    group, block = power_above(heads // kv_heads), power_above(width)
    lanes = group * block
    side_by_side = min(power_above(kv_heads), max(1, 128 // lanes))
    default = {
        "ROWS": max(1, 2048 // (dtype.itemsize * side_by_side * lanes)),
        "BLOCK_H": side_by_side,
        "num_warps": max(1, lanes // 512),
    }
    if kernel == "bwd":
        default |= {"PROGRAMS": 4096, "FOLD": 64}
    shape = bucket(f"G{group}", f"K{block}", amount(key.numel()), dtype)
    return config_for(f"attention_pool_{kernel}", shape, default, key.device)


def tile_shape(rows: int, total: int, patches: int) -> tuple[int, int]:
    """(patches, bytes of each) that make a tile of `rows`.

    As many bytes as patches have on average, so that most patches are over in a step or two; but
    at least 4: what a program carries along grows with its patches, and would spill.
    """
    slots = min(rows, max(4, power_above(max(1, total // max(1, patches)))))
    return rows // slots, slots


def power_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
