"""Matrix products: fragments of `mma.sync`, descriptors and swizzles of `wgmma`.

Layouts are those of the PTX ISA (sections on matrix fragments and on the shared memory layouts of
asynchronous warpgroup products). Products are exact in fp64 sums and rounded to fp32 once per
instruction, which is at least as good as the hardware's own accumulation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import widen
from .lanes import LANES

Array = NDArray[Any]
_GROUP, _IN_GROUP = np.arange(LANES) // 4, np.arange(LANES) % 4


@dataclass(frozen=True)
class Shape:
    """m x n x k of a product of operands of a kind."""

    m: int
    n: int
    k: int
    kind: str  # "bf16", "f16", "tf32"

    @property
    def per_register(self) -> int:
        return 1 if self.kind == "tf32" else 2


def shape_of(opcode: str) -> Shape | None:
    """Shape of `mma.sync...m16n8k16.row.col.f32.bf16.bf16.f32` or its wgmma; None: unknown here."""
    size = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", opcode + ".")
    kinds = opcode.split(".")
    if size is None:
        return None
    m, n, k = map(int, size.groups())
    if opcode.startswith("wgmma"):
        wanted = kinds[-2:]
        result = kinds[-3]
    else:
        wanted = kinds[-3:-1]
        result = kinds[-4]
        if "row.col" not in opcode or (m, n) != (16, 8) or kinds[-1] != "f32":
            return None
    if result != "f32" or wanted[0] != wanted[1] or wanted[0] not in ("bf16", "f16", "tf32"):
        return None
    return Shape(m, n, k, wanted[0])


def numbers(registers: list[Array], kind: str) -> Array:
    """Operand registers (each (units, lanes)) as fp32: (units, lanes, registers, per register)."""
    stacked = np.stack(registers, -1)
    if kind == "tf32":
        # The low 13 bits do not count.
        return (stacked & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(stacked).view(np.uint16).reshape(*stacked.shape, 2)
    return widen(halves, kind)


def operand_a(registers: list[Array], shape: Shape) -> Array:
    """(warps, 16, k) from the fragment of the left operand."""
    values = numbers(registers, shape.kind)
    result = np.zeros((len(values), 16, shape.k), np.float32)
    step = shape.per_register
    for i in range(values.shape[2]):
        rows = _GROUP + 8 * (i % 2)
        for j in range(step):
            result[:, rows, _IN_GROUP * step + j + 4 * step * (i // 2)] = values[:, :, i, j]
    return result


def operand_b(registers: list[Array], shape: Shape) -> Array:
    """(warps, k, 8) from the fragment of the right operand."""
    values = numbers(registers, shape.kind)
    result = np.zeros((len(values), shape.k, 8), np.float32)
    step = shape.per_register
    for i in range(values.shape[2]):
        for j in range(step):
            result[:, _IN_GROUP * step + j + 4 * step * i, _GROUP] = values[:, :, i, j]
    return result


def accumulator(registers: list[Array], columns: int) -> Array:
    """(warps, 16, columns) in fp32 from registers (warps, lanes) of bits, four for 8 columns."""
    values = np.stack(registers, -1).view(np.float32)
    result = np.zeros((len(values), 16, columns), np.float32)
    for i in range(values.shape[-1]):
        result[:, _rows(i), _columns(i)] = values[:, :, i]
    return result


def registers_of(values: Array, count: int) -> list[Array]:
    """The inverse of `accumulator`: bits per lane."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return [bits[:, _rows(i), _columns(i)] for i in range(count)]


def _rows(i: int) -> Array:
    return _GROUP + 8 * (i // 2 % 2)


def _columns(i: int) -> Array:
    return 8 * (i // 4) + 2 * _IN_GROUP + i % 2


def product(a: Array, b: Array, c: Array) -> Array:
    """a @ b + c, rounded to fp32 once."""
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


SWIZZLES = {0: 1, 3: 2, 2: 4, 1: 8}
"""Mode of a descriptor -> 16-byte units of a row of its pattern."""


def descriptor_offsets(
    descriptors: NDArray[np.uint64], rows: int, depth: int, element: int, depth_major: bool
) -> NDArray[np.int64]:
    """Byte offsets in shared memory of a wgmma operand of rows (M or N) x depth (K).

    Args:
        descriptors: (units,) one for each warpgroup.
        element: bytes of an element.
        depth_major: whether elements of one row lie side by side ("K-major").

    Returns:
        (units, rows, depth).
    """
    fields = descriptors.astype(np.int64)
    start = (fields & 0x3FFF) << 4
    leading = ((fields >> 16) & 0x3FFF) << 4
    stride = ((fields >> 32) & 0x3FFF) << 4
    modes = np.unique((descriptors >> np.uint64(62)).astype(np.int64))
    if len(modes) != 1:
        raise ValueError("descriptors of one instruction differ in their swizzle")
    units = SWIZZLES[int(modes[0])]
    per_unit = 16 // element
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    lead, step = leading[:, None, None], stride[:, None, None]
    if depth_major:
        inside = (row % 8) * 16 * units + (k % per_unit) * element
        if units == 1:
            offsets = inside + (k // per_unit) * lead + (row // 8) * step
        else:
            offsets = inside + (k // per_unit) * 16 + (row // 8) * step
    else:
        along = units * per_unit  # elements of M or N in a row of the pattern
        inside = (row % along) * element + (k % 8) * 16 * units
        if units == 1:
            offsets = inside + (row // along) * step + (k // 8) * lead
        else:
            offsets = inside + (row // along) * lead + (k // 8) * step
    return swizzled(start[:, None, None] + offsets, units)


def swizzled(addresses: NDArray[np.int64], units: int) -> NDArray[np.int64]:
    """Addresses with their 16-byte unit moved by the row of 128 bytes they lie in."""
    return addresses ^ (((addresses >> 7) & (units - 1)) << 4)
