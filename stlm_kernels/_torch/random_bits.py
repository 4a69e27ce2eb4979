"""Random bits by counter, on the torch paths: a hash of a seed, a row and a column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import runtime

if TYPE_CHECKING:  # importing numpy takes longer than all else here
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]
COLUMN_STEP = 0x9E3779B97F4A7C15 - 2**64
"""An odd number (2^64 over the golden ratio) that spreads the bits of an id before the mixing."""
ROW_STEP = 0xD1342543DE82EF95 - 2**64
"""Another one, for the row."""
MIX_FIRST, MIX_SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""SplitMix64's multipliers, as int64 holds them."""


def hashed(
    seed: Tensor,  # () int64
    rows: Tensor,  # int64, broadcastable with columns
    columns: Tensor,  # int64
) -> Tensor:
    """64 random bits for each pair of a row and a column, int64."""
    if runtime.values_visible(seed, rows, columns):
        return torch.from_numpy(hashed_words(seed, rows, columns).view("int64"))
    return _hash(seed, rows, columns)


def hashed_words(seed: Tensor, rows: Tensor, columns: Tensor) -> Words:
    """`hashed` of values that can be read, as uint64.

    Many calls for few numbers: numpy's cost half of torch's, and its uint64 shifts in one.
    """
    return _hash_words(int(seed), rows.numpy().view("uint64"), columns.numpy().view("uint64"))


def _hash_words(seed: int, rows: Words, columns: Words) -> Words:
    """`_hash` of the same bits in uint64."""
    state = rows ^ rows.dtype.type(_mixed_number(seed % 2**64))
    state *= ROW_STEP % 2**64
    state = _mix_words(state) ^ columns
    state *= COLUMN_STEP % 2**64
    return _mix_words(state)


def _mixed_number(x: int) -> int:
    """`_mixed` of one number of 64 bits."""
    x = (x ^ x >> 30) * MIX_FIRST % 2**64
    x = (x ^ x >> 27) * MIX_SECOND % 2**64
    return x ^ x >> 31


def _mix_words(x: Words) -> Words:
    """`_mixed`, in place."""
    x ^= x >> 30
    x *= MIX_FIRST % 2**64
    x ^= x >> 27
    x *= MIX_SECOND % 2**64
    x ^= x >> 31
    return x


def _hash(seed: Any, rows: Any, columns: Any) -> Any:
    """Hash of int64 numbers."""
    state = _mixed((_mixed(seed) ^ rows) * ROW_STEP)
    return _mixed((state ^ columns) * COLUMN_STEP)


def _mixed(x: Any) -> Any:
    """SplitMix64's output function; products wrap as int64 ones do everywhere."""
    x = (x ^ shifted(x, 30)) * MIX_FIRST
    x = (x ^ shifted(x, 27)) * MIX_SECOND
    return x ^ shifted(x, 31)


def shifted(x: Any, by: int) -> Any:
    """The bits of int64 moved right, zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)
