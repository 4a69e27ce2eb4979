"""Shifts, bit fields, permutations of bytes and counts of bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .registers import SIGNED, UNSIGNED, Array, bits_of, signed, unsigned

Function = Callable[..., Array]


def shift(left: bool) -> Callable[[list[str]], Function | None]:
    def make(modifiers: list[str]) -> Function | None:
        bits = bits_of(modifiers[-1])

        def apply(a: Array, count: Array) -> Array:
            view = signed(a) if modifiers[-1][0] == "s" else a
            inside = np.minimum(count, bits - 1).astype(view.dtype)
            if left:
                return np.where(count < bits, a << inside.view(a.dtype), a.dtype.type(0))
            shifted = unsigned(view >> inside)
            if view.dtype.kind == "i":  # beyond the width the sign fills all
                return shifted
            return np.where(count < bits, shifted, a.dtype.type(0))

        return apply

    return make


def funnel_shift(modifiers: list[str]) -> Function:
    right, clamps = modifiers[0] == "r", "clamp" in modifiers

    def apply(low: Array, high: Array, count: Array) -> Array:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        n = np.minimum(count, 32) if clamps else count & np.uint32(31)
        n = n.astype(np.uint64)
        if right:
            return (both >> n).astype(np.uint32)
        return ((both << n) >> np.uint64(32)).astype(np.uint32)

    return apply


def lookup(modifiers: list[str]) -> Function:
    def apply(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for row in range(8):
            if int(table.flat[0]) >> row & 1:
                terms = [x if row >> i & 1 else ~x for x, i in ((a, 2), (b, 1), (c, 0))]
                result = result | (terms[0] & terms[1] & terms[2])
        return result

    return apply


def permute(modifiers: list[str]) -> Function | None:
    if modifiers != ["b32"]:
        return None

    def apply(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result: Array = np.zeros(1, np.uint32)
        for i in range(4):
            choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint64(8), sign, byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
        return result

    return apply


def extract_field(modifiers: list[str]) -> Function:
    kind = modifiers[-1]
    bits = bits_of(kind)

    def apply(a: Array, position: Array, length: Array) -> Array:
        value = (signed(a) if kind[0] == "s" else a).astype(
            SIGNED[64] if kind[0] == "s" else UNSIGNED[64]
        )
        position, length = (x.astype(np.int64) & 255 for x in (position, length))
        begin, end = np.minimum(position, bits), np.minimum(position + length, bits)
        if kind[0] == "s":
            up = 64 - np.maximum(end, 1)
            field = (value << up) >> np.minimum(up + begin, 63)
            field = np.where((begin >= bits), np.where(value < 0, -1, 0), field)
            return unsigned(np.where(length == 0, 0, field).astype(SIGNED[bits]))
        width = np.maximum(end - begin, 0).astype(np.uint64)
        ones = np.where(
            width >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(width, 63)) - np.uint64(1)
        )
        field = (value >> np.minimum(begin, 63).astype(np.uint64)) & ones
        return np.where(begin >= bits, np.uint64(0), field).astype(UNSIGNED[bits])

    return apply


def insert_field(modifiers: list[str]) -> Function:
    bits = bits_of(modifiers[-1])

    def apply(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = (x.astype(np.int64) & 255 for x in (position, length))
        width = np.clip(np.minimum(length, bits - position), 0, bits).astype(np.uint64)
        ones = np.where(
            width >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(width, 63)) - np.uint64(1)
        )
        place = np.minimum(position, 63).astype(np.uint64)
        mask = ones << place
        result = (b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << place) & mask)
        return result.astype(UNSIGNED[bits])

    return apply


def count_ones(modifiers: list[str]) -> Function:
    return lambda a: np.bitwise_count(a).astype(np.uint32)


def count_leading_zeros(modifiers: list[str]) -> Function:
    bits = bits_of(modifiers[-1])

    def apply(a: Array) -> Array:
        length = sum(((a >> a.dtype.type(i)) != 0).astype(np.uint32) for i in range(bits))
        return np.asarray(np.uint32(bits) - length)

    return apply


def reverse(modifiers: list[str]) -> Function:
    bits = bits_of(modifiers[-1])

    def apply(a: Array) -> Array:
        one = a.dtype.type(1)
        result = a & a.dtype.type(0)
        for i in range(bits):
            result = result | (((a >> a.dtype.type(i)) & one) << a.dtype.type(bits - 1 - i))
        return result

    return apply
