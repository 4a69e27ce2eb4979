"""`cvt`: conversions between integers and floats with their roundings and saturation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import flushed, narrow, paired, to_single, widen
from .registers import SIGNED, UNSIGNED, Array, bits_of, signed, single, unsigned

Function = Callable[..., Array]

ROUNDINGS = {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"}
ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(modifiers: list[str]) -> Function | None:
    options, target, source = modifiers[:-2], modifiers[-2], modifiers[-1]
    rounding = next((x for x in options if x in ROUNDINGS), "rn")
    if set(options) - ROUNDINGS - {"ftz", "sat", "relu"} or "relu" in options:
        return None
    if target in ("bf16x2", "f16x2") and source == "f32":
        kind = target[:-2]
        if kind == "bf16":
            return lambda high, low: paired(single(high), single(low), rounding)

        def pack(high: Array, low: Array) -> Array:
            first, second = (
                narrow(single(x), kind, rounding).astype(np.uint32) for x in (high, low)
            )
            return (first << np.uint32(16)) | second

        return pack
    known = {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64", "f16", "bf16", "f32", "f64"}
    if source not in known or target not in known | {"tf32"}:
        return None
    if target[0] in "su" and source[0] in "su" and "sat" not in options:
        return _to_other_width(target, source)
    if target == "f32" and source == "bf16" and rounding == "rn" and "sat" not in options:
        return lambda x: x.astype(np.uint16, copy=False).astype(np.uint32) << np.uint32(16)
    if target[0] in "su":
        return _to_integer(target, source, rounding, "sat" in options)
    if rounding in ("rm", "rp"):
        return None
    if "sat" in options or ("ftz" in options and source == target == "f32"):
        return _limited(options, rounding) if source == target == "f32" else None
    if rounding in ROUND_TO_INTEGER:
        to_integral = ROUND_TO_INTEGER[rounding]
        return lambda x: _from_number(to_integral(_number(x, source)), target, "rn")
    return lambda x: _from_number(_number(x, source), target, rounding)


def _to_other_width(target: str, source: str) -> Function:
    """Integers extended or cut."""
    given, bits = np.dtype(UNSIGNED[bits_of(source)]), np.dtype(UNSIGNED[bits_of(target)])
    if source[0] == "u" or bits_of(target) <= bits_of(source):
        return lambda x: x.astype(given, copy=False).astype(bits)
    number, wide = np.dtype(SIGNED[bits_of(source)]), np.dtype(SIGNED[bits_of(target)])
    return lambda x: x.astype(given, copy=False).view(number).astype(wide).view(bits)


def _limited(options: list[str], rounding: str) -> Function:
    """fp32 as fp32: without subnormals (`ftz`), between 0 and 1 with NaN as 0 (`sat`)."""
    to_integral = ROUND_TO_INTEGER.get(rounding)

    def apply(x: Array) -> Array:
        number = single(x) if to_integral is None else to_integral(single(x))
        if "ftz" in options:
            number = flushed(number)
        if "sat" in options:
            number = np.where(np.isnan(number), np.float32(0), np.clip(number, 0, 1))
        return unsigned(number.astype(np.float32))

    return apply


def _number(x: Array, kind: str) -> Array:
    """Register bits as the numbers they stand for, exactly (64-bit integers stay integers)."""
    if kind in ("bf16", "f16"):
        return widen(x.astype(np.uint16, copy=False), kind)
    if kind[0] == "f":
        return single(x)
    narrow_bits = x.astype(UNSIGNED[bits_of(kind)])
    return signed(narrow_bits) if kind[0] == "s" else narrow_bits


def _from_number(x: Array, kind: str, rounding: str) -> Array:
    if kind == "f32":
        if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
            return unsigned(x.astype(np.float32))
        wide = x.astype(np.float64) if x.dtype.kind in "iu" else x
        return unsigned(to_single(wide, rounding))
    if kind == "f64":
        return unsigned(x.astype(np.float64))
    exact = x.astype(np.float64) if x.dtype.kind in "iu" else x
    return narrow(exact, kind, rounding)


def _to_integer(target: str, source: str, rounding: str, saturates: bool) -> Function:
    bits = bits_of(target)
    info: Any = np.iinfo((SIGNED if target[0] == "s" else UNSIGNED)[bits])
    of_nan = np.uint64(1 << (bits - 1) if bits == 64 or source == "f64" else 0)

    def apply(x: Array) -> Array:
        number = _number(x, source)
        if number.dtype.kind == "f":  # always saturates
            whole = ROUND_TO_INTEGER.get(rounding, np.rint)(number.astype(np.float64))
            low, high = float(info.min), float(info.max)
            inside = np.where(np.isnan(whole), 0.0, np.clip(whole, low, np.nextafter(high, 0)))
            result = np.where(whole >= high, info.max, inside.astype(info.dtype))
            result = np.where(np.isnan(whole), np.asarray(of_nan).astype(info.dtype), result)
        else:
            wide = number.astype(np.int64) if number.dtype.kind == "i" else number
            result = np.clip(wide, info.min, info.max) if saturates else wide
        return unsigned(result.astype(info.dtype))

    return apply
