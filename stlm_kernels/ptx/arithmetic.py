"""Instructions without memory, lanes or control flow, as functions of arrays of register bits.

Registers hold unsigned integers, predicates bools. `function_of` turns an opcode into a function
from source arrays to the destination's array; approximations (ex2, lg2, rcp, ...) are computed in
fp64 and rounded, which is within the error that the PTX ISA allows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import bitwise, conversion, formats
from .formats import fused_multiply_add, packed, unpacked, widen
from .registers import SIGNED, UNSIGNED, Array, bits_of, signed

Function = Callable[..., Array]
TYPES = {
    *(f"{kind}{bits}" for kind in "bsu" for bits in (8, 16, 32, 64)),
    *("pred", "f16", "f32", "f64", "bf16", "tf32", "f16x2", "bf16x2", "f32x2", "s16x2", "u16x2"),
}
KNOWN_MODIFIERS = {
    *TYPES,
    *("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu", "NaN"),
    *("xorsign", "abs"),
    *("lo", "hi", "wide", "approx", "full", "l", "r", "wrap", "clamp"),
    *("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "num", "nan"),
    *("equ", "neu", "ltu", "leu", "gtu", "geu", "and", "or", "xor"),
}
"""All that may stand behind an opcode here: a carry, say, would be lost without a word."""


def function_of(opcode: str) -> Function | None:
    """The function of an arithmetic opcode; None where it is of another kind."""
    name, *modifiers = opcode.split(".")
    maker = _MAKERS.get(name)
    if maker is None or not KNOWN_MODIFIERS.issuperset(modifiers):
        return None
    if name != "cvt" and len(TYPES.intersection(modifiers)) > 1:
        return _mixed(name, modifiers)
    return maker(modifiers)


FLOATS: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}


def _floats(modifiers: list[str], function: Function) -> Function | None:
    """`function` over floats of 16, 32 or 64 bits, or pairs, as the last modifier says."""
    kind = modifiers[-1]
    if kind in (*FLOATS, "f32x2"):
        if "ftz" in modifiers:
            function = formats.flushing(function)
        if kind == "f32x2":
            return _by_pairs(function)
        return _viewed(function, FLOATS[kind], np.dtype(UNSIGNED[bits_of(kind)]))
    if kind in ("bf16", "f16"):
        return unpacked(kind, function)
    if kind in ("bf16x2", "f16x2"):
        return packed(kind[:-2], function)
    return None


def _viewed(function: Function, number: np.dtype[Any], bits: np.dtype[Any]) -> Function:
    """A function of register bits from one of the numbers that they stand for."""

    def apply(a: Array, b: Array | None = None, c: Array | None = None) -> Array:
        if b is None:
            return function(a.view(number)).view(bits)
        if c is None:
            return function(a.view(number), b.view(number)).view(bits)
        return function(a.view(number), b.view(number), c.view(number)).view(bits)

    return apply


def _mixed(name: str, modifiers: list[str]) -> Function | None:
    """Sums in fp32 whose first operands are 16-bit floats (sm_100)."""
    sums: dict[str, Function] = {"add": np.add, "sub": np.subtract, "fma": fused_multiply_add}
    combine = sums.get(name)
    kind = modifiers[-1]
    if combine is None or modifiers not in (["rn", "f32", kind], ["f32", kind]):
        return None

    def apply(*operands: Array) -> Array:
        *narrow, last = operands
        return combine(*(widen(x, kind) for x in narrow), last.view(np.float32)).view(np.uint32)

    return apply if kind in ("f16", "bf16") else None


def _by_pairs(function: Function) -> Function:
    """A function of two fp32 numbers in each uint64, from one of fp32 numbers (sm_100)."""

    def apply(*operands: Array) -> Array:
        count = max(len(x) for x in operands)
        numbers = (x if len(x) == count else x.repeat(count) for x in operands)
        return function(*(x.view(np.float32) for x in numbers)).view(np.uint64)

    return apply


def _integers(modifiers: list[str], function: Function) -> Function | None:
    kind = modifiers[-1]
    if kind in ("s16x2", "u16x2"):
        half = _integers([kind[:-2]], function)
        return None if half is None else formats.by_halves(half)
    if kind[0] == "s" and kind[1:].isdecimal():
        bits = bits_of(kind)
        return _viewed(function, np.dtype(SIGNED[bits]), np.dtype(UNSIGNED[bits]))
    if kind[0] in "ub" and kind[1:].isdecimal():
        return function
    return None


def _either(modifiers: list[str], integer: Function, floating: Function) -> Function | None:
    return _integers(modifiers, integer) or _floats(modifiers, floating)


def _add(modifiers: list[str]) -> Function | None:
    return _of_any_sign(modifiers, np.add)


def _sub(modifiers: list[str]) -> Function | None:
    return _of_any_sign(modifiers, np.subtract)


def _of_any_sign(modifiers: list[str], function: Function) -> Function | None:
    """A function whose low bits are the same for signed and unsigned integers."""
    kind = modifiers[-1]
    if _is_unusual(modifiers):
        return None
    return _either(
        [*modifiers[:-1], f"u{kind[1:]}" if kind[0] == "s" else kind], function, function
    )


def _is_unusual(modifiers: list[str]) -> bool:
    """Saturation, or a rounding other than to nearest, which triton does not write here."""
    return bool({"sat", "rz", "rm", "rp"} & set(modifiers))


def _mul(modifiers: list[str]) -> Function | None:
    if modifiers[0] == "wide":
        return _wide_product(modifiers[-1])
    if modifiers[0] == "hi":
        return _high_product(modifiers[-1])
    return _of_any_sign(modifiers, np.multiply)


def _wide_product(kind: str) -> Function:
    types = SIGNED if kind[0] == "s" else UNSIGNED
    narrow, wide = np.dtype(types[bits_of(kind)]), np.dtype(types[2 * bits_of(kind)])
    bits = np.dtype(UNSIGNED[2 * bits_of(kind)])
    return lambda a, b: (a.view(narrow).astype(wide) * b.view(narrow)).view(bits)


def _high_product(kind: str) -> Function:
    bits = bits_of(kind)
    if bits < 64:
        product = _wide_product(kind)
        return lambda a, b: (product(a, b) >> UNSIGNED[2 * bits](bits)).astype(UNSIGNED[bits])

    def apply(a: Array, b: Array) -> Array:
        mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        low_a, high_a, low_b, high_b = a & mask, a >> half, b & mask, b >> half
        middle = high_a * low_b + ((low_a * low_b) >> half)
        other = low_a * high_b + (middle & mask)
        high = high_a * high_b + (middle >> half) + (other >> half)
        if kind[0] == "s":
            high = high - np.where(signed(a) < 0, b, np.uint64(0))
            high = high - np.where(signed(b) < 0, a, np.uint64(0))
        return high

    return apply


def _mad(modifiers: list[str]) -> Function | None:
    product = _mul(modifiers)
    if product is None or modifiers[-1][0] == "f":
        return None
    return lambda a, b, c: product(a, b) + c


def _fma(modifiers: list[str]) -> Function | None:
    if modifiers[0] == "rm" and modifiers[-1] == "f32" and "sat" not in modifiers:
        return _floats(modifiers, formats.fused_multiply_add_down)
    if _is_unusual(modifiers) or "relu" in modifiers:
        return None
    if modifiers[-1] in ("f32", "f32x2"):
        return _floats(modifiers, fused_multiply_add)
    if modifiers[-1] == "f64":
        return None
    # fp64 holds products of 16-bit floats exactly, and their sums well beyond a second rounding.
    return _floats(modifiers, lambda a, b, c: a * b + c)


def _div(modifiers: list[str]) -> Function | None:
    if _is_unusual(modifiers):
        return None
    return _either(modifiers, _truncated_quotient, np.divide)


def _truncated_quotient(a: Array, b: Array) -> Array:
    b = np.where(b == 0, b.dtype.type(1), b)  # the result of a division by zero is unspecified
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _rem(modifiers: list[str]) -> Function | None:
    return _integers(modifiers, lambda a, b: a - _truncated_quotient(a, b) * b)


def _extremum(
    integer: Function, ignoring_nan: Function, keeping_nan: Function
) -> Callable[[list[str]], Function | None]:
    def make(modifiers: list[str]) -> Function | None:
        relu = "relu" in modifiers
        floating = _of_two_or_three(keeping_nan if "NaN" in modifiers else ignoring_nan)
        if "xorsign" in modifiers or "abs" in modifiers:
            known = "xorsign" in modifiers and "abs" in modifiers and not relu
            return _floats(modifiers, _with_product_sign(floating)) if known else None

        def clamped(function: Function) -> Function:
            return (lambda *x: np.maximum(function(*x), x[0].dtype.type(0))) if relu else function

        return _either(modifiers, clamped(integer), clamped(floating))

    return make


def _of_two_or_three(function: Function) -> Function:
    """A function of two operands, which sm_100 has for three; a ufunc would write to the third."""

    def apply(a: Array, b: Array, c: Array | None = None) -> Array:
        return function(a, b) if c is None else function(function(a, b), c)

    return apply


def _with_product_sign(function: Function) -> Function:
    """A function of absolute values, with the sign that the product of the operands would have."""

    def apply(a: Array, b: Array) -> Array:
        sign = np.where(np.signbit(a) ^ np.signbit(b), a.dtype.type(-1), a.dtype.type(1))
        return np.copysign(function(np.abs(a), np.abs(b)), sign)

    return apply


def _unary(integer: Function, floating: Function) -> Callable[[list[str]], Function | None]:
    return lambda modifiers: _either(modifiers, integer, floating)


def _approximation(function: Function) -> Callable[[list[str]], Function | None]:
    def make(modifiers: list[str]) -> Function | None:
        kind = modifiers[-1]
        if kind not in ("f32", "f16", "bf16", "f16x2", "bf16x2") or _is_unusual(modifiers):
            return None
        if kind == "f32":
            return _floats(modifiers, lambda x: function(x.astype(np.float64)).astype(np.float32))
        return _floats(modifiers, function)

    return make


def _bitwise(function: Function) -> Callable[[list[str]], Function | None]:
    return lambda modifiers: function


def _not(modifiers: list[str]) -> Function:
    return np.logical_not if modifiers[-1] == "pred" else np.invert


def _selp(modifiers: list[str]) -> Function:
    def apply(a: Array, b: Array, chosen: Array) -> Array:
        return np.where(chosen, a, b)

    return apply


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _setp(modifiers: list[str]) -> Function | None:
    kind, name = modifiers[-1], modifiers[0]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    flushes = "ftz" in modifiers
    compare = (
        _float_comparison(name) if kind[0] == "f" or kind[:2] == "bf" else _COMPARISONS.get(name)
    )
    known = {"f32", "f64", "f16", "bf16", *(f"{x}{n}" for x in "sub" for n in (16, 32, 64))}
    if compare is None or kind not in known:
        return None

    if flushes:
        compare = _of_flushed(compare)
    if kind in ("bf16", "f16"):
        compare = _of_wide(compare, kind)
    bits = bits_of(kind)
    types = SIGNED if kind[0] == "s" else UNSIGNED
    number = FLOATS[kind] if kind in FLOATS else np.dtype(types[bits])

    def apply(a: Array, b: Array, other: Array | None = None) -> Array:
        result = compare(a.view(number), b.view(number))
        return result if other is None else combine[modifiers[1]](result, other)

    return compare if number == UNSIGNED[bits] and len(modifiers) == 2 else apply


def _of_flushed(compare: Function) -> Function:
    return lambda a, b: compare(formats.flushed(a), formats.flushed(b))


def _of_wide(compare: Function, kind: str) -> Function:
    return lambda a, b: compare(widen(a, kind), widen(b, kind))


def _float_comparison(name: str) -> Callable[[Array, Array], Array] | None:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":  # ordered: false where either is NaN
        return lambda a, b: (a < b) | (a > b)
    if name in _COMPARISONS:
        return _COMPARISONS[name]
    ordered = _COMPARISONS.get(name.removesuffix("u"))
    if ordered is None:
        return None
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def _copysign(modifiers: list[str]) -> Function | None:
    return _floats(modifiers, lambda a, b: np.copysign(b, a))


def _mov(modifiers: list[str]) -> Function:
    return lambda a: a


_MAKERS: dict[str, Callable[[list[str]], Function | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "max": _extremum(np.maximum, np.fmax, np.maximum),
    "min": _extremum(np.minimum, np.fmin, np.minimum),
    "neg": _unary(np.negative, np.negative),
    "abs": _unary(np.abs, np.abs),
    "and": _bitwise(np.bitwise_and),
    "or": _bitwise(np.bitwise_or),
    "xor": _bitwise(np.bitwise_xor),
    "not": _not,
    "shl": bitwise.shift(left=True),
    "shr": bitwise.shift(left=False),
    "shf": bitwise.funnel_shift,
    "lop3": bitwise.lookup,
    "prmt": bitwise.permute,
    "bfe": bitwise.extract_field,
    "bfi": bitwise.insert_field,
    "popc": bitwise.count_ones,
    "clz": bitwise.count_leading_zeros,
    "brev": bitwise.reverse,
    "selp": _selp,
    "setp": _setp,
    "cvt": conversion.convert,
    "mov": _mov,
    "copysign": _copysign,
    "ex2": _approximation(np.exp2),
    "lg2": _approximation(np.log2),
    "rcp": _approximation(np.reciprocal),
    "sqrt": _approximation(np.sqrt),
    "rsqrt": _approximation(lambda x: 1 / np.sqrt(x)),
    "tanh": _approximation(np.tanh),
    "sin": _approximation(np.sin),
    "cos": _approximation(np.cos),
}
