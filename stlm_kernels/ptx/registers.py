"""Types of registers: widths, and views of their bits as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = Array | None
"""Flags of active threads; None where all are."""

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def bits_of(kind: str) -> int:
    """Width of a type such as "s32", "bf16x2" or "pred"."""
    if kind == "pred":
        return 1
    if kind == "tf32":
        return 32
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    return int(kind.lstrip("bfus"))


def signed(x: Array) -> Array:
    return x.view(SIGNED[8 * x.dtype.itemsize])


def unsigned(x: Array) -> Array:
    return x.view(UNSIGNED[8 * x.dtype.itemsize])


def single(x: Array) -> Array:
    return x.view(np.float32 if x.dtype.itemsize == 4 else np.float64)
