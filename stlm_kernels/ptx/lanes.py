"""Work of a warp's 32 lanes together: shuffles, votes, reductions, matrix loads and stores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES = 32
_LANE = np.arange(LANES)


def by_warp(x: Array) -> Array:
    """(threads,) as (warps, 32)."""
    return x.reshape(-1, LANES)


def sources(mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """Return the lane that each lane of `shfl.sync` reads, and whether it was in range.

    Args:
        mode: "up", "down", "bfly" or "idx".
        b, c: integers of each lane, (warps, 32).
    """
    clamp, segment = c & 31, (c >> 8) & 31
    lowest = _LANE & segment
    highest = lowest | (clamp & ~segment)
    if mode == "up":
        source = _LANE - (b & 31)
        in_range = source >= highest
    elif mode == "down":
        source = _LANE + (b & 31)
        in_range = source <= highest
    elif mode == "bfly":
        source = _LANE ^ (b & 31)
        in_range = source <= highest
    else:  # idx
        source = lowest | (b & 31 & ~segment)
        in_range = source <= highest
    return np.where(in_range, source, _LANE), in_range


def shuffle(mode: str, value: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """`shfl.sync`: each lane's value from another lane, and whether that lane was in range."""
    source, in_range = sources(mode, by_warp(b).astype(np.int64), by_warp(c).astype(np.int64))
    return np.take_along_axis(by_warp(value), source, 1).reshape(-1), in_range.reshape(-1)


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "fmin": np.fmin,
    "fmax": np.fmax,
}


def reduce(name: str, value: Array) -> Array:
    """`redux.sync` over whole warps."""
    total = REDUCTIONS[name].reduce(by_warp(value), 1, dtype=value.dtype)
    return np.repeat(total, LANES)


def ballot(value: Array) -> Array:
    """A bit per lane."""
    bits = by_warp(value).astype(np.uint64) << _LANE.astype(np.uint64)
    return np.repeat(bits.sum(1).astype(np.uint32), LANES)


def rows_of_matrices(addresses: Array, count: int) -> Array:
    """Return where the eight rows of `count` 8 x 8 matrices begin: (warps, count, 8).

    Lanes 8 i to 8 i + 7 hold the addresses of matrix i.
    """
    return by_warp(addresses)[:, : 8 * count].reshape(-1, count, 8)


def fragments_of(matrices: Array, transposed: bool) -> list[Array]:
    """`ldmatrix`: (warps, count, 8, 8) of 16-bit words as a uint32 per lane and matrix."""
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, count, 8, 4)
    lanes = pairs.reshape(*pairs.shape[:2], LANES)
    return [lanes[:, i].reshape(-1) for i in range(lanes.shape[1])]


def matrices_of(fragments: list[Array], transposed: bool) -> Array:
    """`stmatrix`: the inverse of `fragments_of`."""
    pairs = np.stack([by_warp(x) for x in fragments], 1)
    words = np.ascontiguousarray(pairs).view(np.uint16).reshape(*pairs.shape[:2], 8, 8)
    return words.swapaxes(2, 3) if transposed else words
