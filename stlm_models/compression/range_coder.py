"""A range coder: symbols to bytes and back, given how likely each symbol is. Integers alone.

The code is a number in [0, 1), written in base 256. Each symbol narrows the interval that the
number may lie in to the symbol's share of it, and digits leave when the rest no longer matters.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

TOTAL_BITS = 24
"""The shares of all symbols add up to 2 ** TOTAL_BITS."""
WIDTH_BITS = 48
"""The interval is at most 2 ** WIDTH_BITS wide; a product with a share stays below 64 bits."""
LAST_DIGIT = WIDTH_BITS - 8
"""Narrowest interval, 2 ** LAST_DIGIT: rounding costs a symbol 2 ** -16 of its interval."""
MASK = (1 << WIDTH_BITS) - 1


class Encoder:
    """Writes symbols, each as its share [start, end) of 2 ** TOTAL_BITS."""

    def __init__(self) -> None:
        self._low, self._width = 0, 1 << WIDTH_BITS
        self._digits = bytearray()

    def encode(self, start: int, end: int) -> None:
        """One symbol; 0 <= start < end <= 2 ** TOTAL_BITS."""
        unit = self._width >> TOTAL_BITS
        self._raise_low(unit * start)
        self._width = unit * (end - start)
        while self._width < 1 << LAST_DIGIT:
            self._shift_out()
            self._width <<= 8

    def finish(self) -> bytes:
        """The code of all symbols."""
        # The first number of the interval all of whose digits but one have left.
        self._raise_low((1 << LAST_DIGIT) - 1)
        self._shift_out()
        return bytes(self._digits)

    def _shift_out(self) -> None:
        self._digits.append(self._low >> LAST_DIGIT)
        self._low = (self._low << 8) & MASK

    def _raise_low(self, by: int) -> None:
        self._low += by
        if self._low <= MASK:
            return
        self._low &= MASK
        at = len(self._digits) - 1
        while self._digits[at] == 255:
            self._digits[at] = 0
            at -= 1
        self._digits[at] += 1


class Decoder:
    """Reads back what an `Encoder` has written; from anything else, any symbols.

    Behind the code it reads zeros.
    """

    def __init__(self, code: bytes) -> None:
        self._code, self._read = code, 0
        self._width = 1 << WIDTH_BITS
        self._offset = 0
        """Offset of the code in the interval."""
        for _ in range(WIDTH_BITS // 8):
            self._shift_in()

    def decode(self, cumulative: Sequence[int]) -> int:
        """The next symbol, of which symbol s has the share [cumulative[s], cumulative[s + 1])."""
        unit = self._width >> TOTAL_BITS
        at = min(self._offset // unit, (1 << TOTAL_BITS) - 1)
        symbol = bisect_right(cumulative, at) - 1
        start, end = int(cumulative[symbol]), int(cumulative[symbol + 1])
        self._offset -= unit * start
        self._width = unit * (end - start)
        while self._width < 1 << LAST_DIGIT:
            self._shift_in()
            self._width <<= 8
        return symbol

    def _shift_in(self) -> None:
        digit = self._code[self._read] if self._read < len(self._code) else 0
        self._read += 1
        self._offset = self._offset << 8 | digit


def most_symbols(digits: int, alphabet: int) -> int:
    """Most symbols that a code of so many bytes can hold, where none has an empty share.

    The likeliest symbol costs so many bits at least, and all digits but one have left the interval,
    which is never narrower than a digit.
    """
    least_bits = -math.log1p(-(alphabet - 1) / 2**TOTAL_BITS) / math.log(2)
    return int(8 * max(0, digits) / least_bits)
