"""Shifts, bit fields, permutations of bytes and counts of bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .registers import SIGNED, UNSIGNED, Array, bits_of, signed, unsigned

Function = Callable[..., Array]


def shift(left: bool) -> Callable[[list[str]], Function | None]:
    def make(modifiers: list[str]) -> Function | None:
        bits = bits_of(modifiers[-1])
        fills = modifiers[-1][0] == "s" and not left  # beyond the width the sign fills all
        number, unsigned_number = np.dtype(SIGNED[bits]), np.dtype(UNSIGNED[bits])
        operation = np.left_shift if left else np.right_shift

        steps = np.arange(bits, dtype=number if fills else unsigned_number)[:, None]

        def apply(a: Array, count: Array) -> Array:
            if len(count) == 1 and (places := int(count[0])) < bits:
                by = steps[places]
                if fills:
                    return operation(a.view(number), by).view(unsigned_number)
                return operation(a, by)
            inside = np.minimum(count, bits - 1)
            if fills:
                return operation(a.view(number), inside.astype(number)).view(unsigned_number)
            return np.where(count < bits, operation(a, inside.astype(a.dtype)), a.dtype.type(0))

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
        if len(selector) == 1 and not selector[0] & np.uint32(0x8888):
            return _chosen_bytes(a, b, int(selector[0]))
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


def _chosen_bytes(a: Array, b: Array, selector: int) -> Array:
    """Bytes of two words in another order, the same for all threads."""
    words = np.empty(max(len(a), len(b)), np.uint32)
    to, of_a, of_b = (x.view(np.uint8).reshape(-1, 4) for x in (words, a, b))
    for i in range(4):
        choice = selector >> 4 * i & 7
        to[:, i] = of_a[:, choice] if choice < 4 else of_b[:, choice - 4]
    return words


def extract_field(modifiers: list[str]) -> Function:
    kind = modifiers[-1]
    bits = bits_of(kind)

    def apply(a: Array, position: Array, length: Array) -> Array:
        if len(position) == len(length) == 1 and kind[0] == "u":
            begin, width = int(position[0]) & 255, int(length[0]) & 255
            if begin < bits:
                word = a.dtype.type
                return (a >> word(begin)) & word((1 << min(width, bits)) - 1)
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
