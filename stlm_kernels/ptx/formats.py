"""Number formats by their bits: conversions with every rounding, and exact fused multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]
Floats = NDArray[np.floating]

_ONE, _SIZE, _LARGEST_SUBNORMAL = np.uint32(1), np.uint32(0x7FFFFFFF), np.uint32(0x7FFFFF)
_HALF_BITS, _UPPER_HALF, _BELOW_HALF = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0x7FFF)
_LOW = np.uint64((1 << 29) - 1)
"""Bits of an fp64 number that an fp32 one lacks."""
_HALF_WAY = np.uint64(1 << 28)
_TINY = np.float32(2.0**-125).view(np.uint32)


def paired(high: Floats, low: Floats, rounding: str) -> Bits:
    """Two fp32 numbers as bf16 in one uint32, for the roundings that `narrow` has."""
    first, second = (_in_upper_half(x, rounding) for x in (high, low))
    return (first & _UPPER_HALF) | (second >> _HALF_BITS)


def _in_upper_half(values: Floats, rounding: str) -> Bits:
    """fp32 numbers rounded to bf16 in the upper half of a uint32; the lower half is no number."""
    bits = values.view(np.uint32)
    if rounding == "rn":
        rounded = bits + (_BELOW_HALF + ((bits >> _HALF_BITS) & _ONE))
    else:
        rounded = bits + (_BELOW_HALF + _ONE) if rounding == "rna" else bits
    nan = values != values
    return np.where(nan, _SIZE, rounded) if np.count_nonzero(nan) else rounded


def widen(bits: Bits, kind: str) -> NDArray[np.float32]:
    """16-bit floats as fp32, exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(values: Floats, kind: str, rounding: str = "rn") -> Bits:
    """Round floats to "bf16", "f16" (uint16) or "tf32" (uint32 with the low bits zero).

    Args:
        values: fp32 or fp64; exact arithmetic comes in fp64, so that it is rounded once.
        rounding: "rn" to nearest even, "rna" to nearest away from zero, "rz" towards zero.
    """
    if kind == "f16":
        return _narrow_to_half(values, rounding)
    single = to_single(values, "rn" if rounding == "rna" else rounding)
    dropped = np.uint32(16 if kind == "bf16" else 13)
    bits = single.view(np.uint32)
    if rounding == "rn" and values.dtype == np.float64:
        bits = to_odd(values.astype(np.float64)).view(np.uint32)
    half = _ONE << (dropped - _ONE)
    if rounding == "rn":
        rounded = bits + ((half - _ONE) + ((bits >> dropped) & _ONE))
    elif rounding == "rna":
        rounded = bits + half
    else:
        rounded = bits
    nan = single != single
    if np.count_nonzero(nan):
        rounded = np.where(nan, _SIZE, rounded)
    if kind == "tf32":
        return rounded & ~((_ONE << dropped) - _ONE)
    return (rounded >> dropped).astype(np.uint16)


def _narrow_to_half(values: Floats, rounding: str) -> Bits:
    half = values.astype(np.float16)
    if rounding == "rz":
        beyond = np.abs(half.astype(np.float64)) > np.abs(values.astype(np.float64))
        half = np.where(beyond, np.nextafter(half, np.float16(0)), half)
    nan = values != values
    bits = half.view(np.uint16)
    return np.where(nan, np.uint16(0x7FFF), bits) if np.count_nonzero(nan) else bits


def to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """fp64 as fp32 rounded to odd: a later rounding to fewer bits is then the only one."""
    single = to_single(values, "rz")
    inexact = (single.astype(np.float64) != values) & np.isfinite(values)
    return (single.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def to_single(values: Floats, rounding: str = "rn") -> NDArray[np.float32]:
    """Floats as fp32."""
    if values.dtype == np.float32:
        return values  # type: ignore[return-value]
    single = values.astype(np.float32)
    if rounding == "rz":
        beyond = np.abs(single.astype(np.float64)) > np.abs(values)
        single = np.where(beyond, np.nextafter(single, np.float32(0)), single)
    return single


def flushed(values: Floats) -> Floats:
    """Subnormal fp32 numbers as zeros of their sign (`.ftz`)."""
    subnormal = _nonzero_below(values, _LARGEST_SUBNORMAL)
    if not np.count_nonzero(subnormal):
        return values
    return np.where(subnormal, np.copysign(np.float32(0), values), values)


def _nonzero_below(values: Floats, size: np.uint32) -> NDArray[np.bool_]:
    """Return which fp32 numbers are not zero and have no more than `size` as their bits."""
    bits = values.view(np.uint32) & _SIZE
    bits -= _ONE  # zeros become the largest number
    return bits < size


def _all_flushed(operands: Sequence[Floats]) -> Sequence[Floats]:
    """`flushed` of each: subnormal numbers are few, so all are looked through together."""
    several = [x for x in operands if len(x) > 1]
    together = np.concatenate(several) if len(several) > 1 else operands[0]
    if len(several) < 2 or np.count_nonzero(_nonzero_below(together, _LARGEST_SUBNORMAL)):
        return [flushed(x) for x in operands]
    return [x if len(x) > 1 else flushed(x) for x in operands]


def flushing(function: Callable[..., Floats]) -> Callable[..., Floats]:
    """A function of fp32 numbers that takes and returns subnormal ones as zeros."""
    return lambda *operands: flushed(function(*_all_flushed(operands)))


def fused_multiply_add(a: Floats, b: Floats, c: Floats) -> NDArray[np.float32]:
    """a * b + c of fp32 numbers, rounded once.

    The product is exact in fp64. Its sum with c is not, and rounding that to fp32 would round
    twice; this shows where the sum lies half way between two fp32 numbers, or is subnormal there,
    and those few are rounded to odd first.
    """
    product = a.astype(np.float64) * b
    total = product + c
    low = total.view(np.uint64) & _LOW
    doubtful = low == _HALF_WAY
    result = total.astype(np.float32)
    # What became zero was exact, or far enough from the smallest number.
    doubtful |= _nonzero_below(result, _TINY)
    if np.count_nonzero(doubtful):
        few = np.flatnonzero(doubtful & np.isfinite(total))
        total[few] = _odd_sum(
            product if len(product) == 1 else product[few],
            c if len(c) == 1 else c[few],
            total[few],
        )
        return total.astype(np.float32)
    return result


def _odd_sum(a: NDArray[np.float64], b: Floats, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """a + b rounded to odd in fp64, from the sum that was rounded to nearest."""
    b = b.astype(np.float64)
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, towards), total)


def fused_multiply_add_down(a: Floats, b: Floats, c: Floats) -> NDArray[np.float32]:
    """a * b + c of fp32 numbers, rounded once towards minus infinity."""
    product, last = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + last
    part = total - product
    error = (product - (total - part)) + (last - part)
    single = total.astype(np.float32)
    above = (single > total) | ((single == total) & (error < 0))
    single = np.where(above, np.nextafter(single, np.float32(-np.inf)), single)
    cancels = (total == 0) & (np.signbit(product) != np.signbit(last))
    return np.where(cancels, np.float32(-0.0), single)


def packed(kind: str, function: Callable[..., Floats]) -> Callable[..., Bits]:
    """A function of two 16-bit floats in each uint32, from one of exact floats."""
    return by_halves(unpacked(kind, function))


def by_halves(function: Callable[..., Bits]) -> Callable[..., Bits]:
    """A function of two 16-bit values in each uint32, from one of uint16."""

    def apply(*operands: Bits) -> Bits:
        # As twice as many 16-bit words, the low one first.
        count = max(map(len, operands))
        whole = [x if len(x) == count else x.repeat(count) for x in operands]
        return function(*[x.view(np.uint16) for x in whole]).view(np.uint32)

    return apply


def unpacked(kind: str, function: Callable[..., Floats]) -> Callable[..., Bits]:
    """A function of 16-bit floats from one of exact floats, rounded once."""

    def apply(*operands: Bits) -> Bits:
        return narrow(function(*(widen(x, kind).astype(np.float64) for x in operands)), kind)

    return apply
