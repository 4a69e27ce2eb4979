"""Matrix products: fragments of `mma.sync`, descriptors and swizzles of `wgmma`.

Layouts are those of the PTX ISA (sections on matrix fragments and on the shared memory layouts of
asynchronous warpgroup products). Products are exact in fp64 sums and rounded to the kind of their
sums once per instruction, which is at least as good as the hardware's own accumulation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .elements import WORDS
from .formats import narrow, widen
from .lanes import LANES

Array = NDArray[Any]

BYTES = {"s8": 1, "u8": 1, "bf16": 2, "f16": 2, "tf32": 4, "f64": 8}
"""Size of an element of each kind of operand."""
SUMS = {
    "s8": ("s32",), "u8": ("s32",), "bf16": ("f32",), "f16": ("f32", "f16"), "tf32": ("f32",),
    "f64": ("f64",),
}  # fmt: skip
"""Kinds of sums for each kind of operands."""


@dataclass(frozen=True)
class Shape:
    """m x n x k of a product of operands of a kind, one of `BYTES`.

    Args:
        sums: kind of the sums, one of `SUMS`.
        saturates: integer sums stay at the largest number instead of wrapping around.
    """

    m: int
    n: int
    k: int
    kind: str
    sums: str = "f32"
    saturates: bool = False

    @property
    def per_register(self) -> int:
        return max(1, 4 // BYTES[self.kind])

    @property
    def operand_bits(self) -> int:
        """Width of the registers that hold operands and sums."""
        return 64 if self.kind == "f64" else 32


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
        has_this_form = "row.col" in opcode and (m == 16 or wanted[0] == "f64") and n == 8
        if not has_this_form or kinds[-1] != result:
            return None
    if wanted[0] != wanted[1] or result not in SUMS.get(wanted[0], ()):
        return None
    return Shape(m, n, k, wanted[0], result, "satfinite" in kinds)


def numbers(registers: Sequence[Array] | Array, kind: str) -> Array:
    """Operand registers, each (units, lanes), as floats (registers, units, lanes, per register)."""
    bits = np.asarray(registers)
    return of_words(bits.view(WORDS[BYTES[kind]]).reshape(*bits.shape, -1), kind)


def of_words(words: Array, kind: str) -> Array:
    """Elements of a kind by their bits, as fp32 (fp64 where they are that): exact."""
    if kind == "f64":
        return words.view(np.float64)
    if kind == "tf32":
        # The low 13 bits do not count.
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)
    return widen(words, kind)


def operand_a(registers: Sequence[Array] | Array, shape: Shape) -> Array:
    """(warps, 16 or m, k) from the fragment of the left operand."""
    values = numbers(registers, shape.kind)
    rows = min(shape.m, 16)
    # Lanes are a row of 8 and a fourth of the columns; registers go down the rows first.
    each = values.reshape(len(values) * 8 // rows, rows // 8, -1, 8, 4, shape.per_register)
    return each.transpose(2, 1, 3, 0, 4, 5).reshape(-1, rows, shape.k)


def operand_b(registers: Sequence[Array] | Array, shape: Shape) -> Array:
    """(warps, k, 8) from the fragment of the right operand."""
    values = numbers(registers, shape.kind)
    each = values.reshape(len(values), -1, 8, 4, shape.per_register)
    return each.transpose(1, 0, 3, 4, 2).reshape(-1, shape.k, 8)


def accumulator(
    registers: Sequence[Array] | Array, columns: int, sums: str = "f32", rows: int = 16
) -> Array:
    """(warps, rows, columns) from registers (warps, lanes) of bits: in fp32, fp64 or int32.

    A lane has two numbers of each 8 x 8 block; a register holds one, or two fp16 numbers.
    """
    bits, blocks = np.asarray(registers), (columns // 8, rows // 8)
    if sums == "f16":
        halves = widen(bits.view(np.uint16), "f16").reshape(*blocks, -1, 8, 4, 2)
        return halves.transpose(2, 1, 3, 0, 4, 5).reshape(-1, rows, columns)
    values = bits.view({"f32": np.float32, "f64": np.float64, "s32": np.int32}[sums])
    each = values.reshape(*blocks, 2, -1, 8, 4)
    return each.transpose(3, 1, 4, 0, 5, 2).reshape(-1, rows, columns)


def registers_of(values: Array, count: int, sums: str = "f32") -> list[Array]:
    """The inverse of `accumulator`: bits per lane, (warps, lanes)."""
    warps, rows, columns = values.shape
    if sums == "f16":
        bits = narrow(values, "f16")
    else:
        bits = np.ascontiguousarray(values).view(WORDS[values.dtype.itemsize])
    each = bits.reshape(warps, rows // 8, 8, columns // 8, 4, 2)
    if sums == "f16":  # pairs make a register
        pairs = np.ascontiguousarray(each.transpose(3, 1, 0, 2, 4, 5)).view(np.uint32)
        return list(pairs.reshape(count, warps, LANES))
    return list(each.transpose(3, 1, 5, 0, 2, 4).reshape(count, warps, LANES))


def product(a: Array, b: Array, c: Array, sums: str = "f32", saturates: bool = False) -> Array:
    """a @ b + c, rounded to the kind of sums once (fp64 at each addition)."""
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    if sums == "f16":
        return widen(narrow(exact, "f16"), "f16")
    if sums == "s32":
        limits = np.iinfo(np.int32)
        whole = np.clip(exact, limits.min, limits.max) if saturates else exact
        return whole.astype(np.int64).astype(np.int32)
    return exact.astype(np.float32 if sums == "f32" else np.float64)


UNIT = 16
"""Bytes that a product reads together, whatever its swizzle."""
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


@functools.lru_cache(maxsize=1024)
def unit_offsets(
    descriptor: int, rows: int, depth: int, element: int, depth_major: bool
) -> NDArray[np.int64]:
    """First bytes of the 16-byte units of an operand, (rows, units) or (units, depth): cached."""
    one = np.array([descriptor], np.uint64)
    offsets = descriptor_offsets(one, rows, depth, element, depth_major)[0]
    per_unit = UNIT // element
    return offsets[:, ::per_unit] if depth_major else offsets[::per_unit]


def swizzled(addresses: NDArray[np.int64], units: int) -> NDArray[np.int64]:
    """Addresses with their 16-byte unit moved by the row of 128 bytes they lie in."""
    return addresses ^ (((addresses >> 7) & (units - 1)) << 4)
