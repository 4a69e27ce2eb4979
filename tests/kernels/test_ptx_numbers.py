"""The numbers of the executor: all 16-bit floats by brute force, functions over their domain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from stlm_kernels.ptx import formats
from stlm_kernels.ptx.arithmetic import function_of

KINDS = pytest.mark.parametrize("kind", ["bf16", "f16"])
ALL_16 = np.arange(1 << 16, dtype=np.uint16)


def apply(opcode: str, *operands: np.ndarray) -> np.ndarray:
    function = function_of(opcode)
    assert function is not None, opcode
    with np.errstate(all="ignore"):
        return function(*operands)


def neighbours(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of every finite 16-bit float but the largest, its number and the next in magnitude."""
    largest = {"bf16": 0x7F7F, "f16": 0x7BFF}[kind]
    few = ALL_16[largest > (ALL_16 & 0x7FFF)]
    return few, formats.widen(few, kind), formats.widen(few + np.uint16(1), kind)


@KINDS
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_all_roundings_between_neighbours(kind: str, source: str) -> None:
    """Roundings at every 16-bit float, half way to the next, and right before and after that."""
    bits, low, high = neighbours(kind)
    dtype = np.float32 if source == "f32" else np.float64
    low, high = low.astype(dtype), high.astype(dtype)
    half = low + (high - low) / 2
    before, after = np.nextafter(half, low), np.nextafter(half, high)
    up = bits + np.uint16(1)
    even = np.where(bits & 1, up, bits)
    for x, nearest in ((low, bits), (before, bits), (half, even), (after, up)):
        words = x.view(np.uint32 if source == "f32" else np.uint64)
        np.testing.assert_array_equal(apply(f"cvt.rn.{kind}.{source}", words), nearest)
        np.testing.assert_array_equal(apply(f"cvt.rz.{kind}.{source}", words), bits)
        if source == "f32":
            pairs = apply(f"cvt.rn.{kind}x2.f32", words, words[::-1].copy())
            np.testing.assert_array_equal(pairs >> 16, nearest)
            np.testing.assert_array_equal(pairs & 0xFFFF, nearest[::-1])


@KINDS
@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_all_16_bit_floats_as_integers(kind: str, target: str, rounding: str) -> None:
    values = formats.widen(ALL_16, kind).astype(np.float64)
    width = int(target[1:])
    low, high = (
        (0, 2**width - 1) if target[0] == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    )
    round_to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    got = apply(f"cvt.{rounding}.{target}.{kind}", ALL_16)
    got = got.view(f"i{got.dtype.itemsize}") if target[0] == "s" else got
    for x, found in zip(values[::7].tolist(), got[::7].tolist(), strict=True):
        if x != x:  # the ISA says 0, and the highest bit alone for 64 bits
            assert found == (0 if width < 64 else low)
        else:
            want = low if x <= low else high if x >= high else int(round_to(x))
            assert found == want, x


@KINDS
def test_all_16_bit_floats_as_others(kind: str) -> None:
    values = formats.widen(ALL_16, kind)
    numbers = ~np.isnan(values)
    wide = apply(f"cvt.f64.{kind}", ALL_16).view(np.float64)
    np.testing.assert_array_equal(wide, values.astype(np.float64))
    other = {"bf16": "f16", "f16": "bf16"}[kind]
    got = apply(f"cvt.rn.{other}.{kind}", ALL_16)
    np.testing.assert_array_equal(got[numbers], formats.narrow(values, other)[numbers])


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "error"),
    [
        ("sin.approx.f32", np.sin, -np.pi, np.pi, 2**-20.5),
        ("cos.approx.ftz.f32", np.cos, -np.pi, np.pi, 2**-20.5),
        ("tanh.approx.f32", np.tanh, -20, 20, 2**-11),
        ("ex2.approx.f32", np.exp2, -126, 127, None),
        ("lg2.approx.ftz.f32", np.log2, 2.0**-100, 2.0**100, None),
    ],
)
def test_functions_within_the_error_that_the_isa_states(
    name: str,
    exact: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    error: float | None,
) -> None:
    """Ours are nearer than that: they are rounded from fp64, half a unit off at most."""
    values = np.linspace(low, high, 20_001).astype(np.float32)
    got = apply(name, values.view(np.uint32)).view(np.float32).astype(np.float64)
    want = exact(values.astype(np.float64))
    off = np.abs(got - want)
    assert (off <= np.spacing(np.abs(want).astype(np.float32))).all()
    if error is not None:
        assert off.max() <= error
    assert (got != 0).sum() > 19_000


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_extremes_of_magnitudes(name: str, nan: str, kind: str) -> None:
    """`xorsign.abs`: the magnitude of one operand, the sign of the product."""
    numbers = np.array([0.0, -0.0, 1.5, -1.5, 2.0, -2.0, np.inf, -np.inf, np.nan], np.float32)
    a, b = (x.reshape(-1) for x in np.meshgrid(numbers, numbers))
    words = [x.view(np.uint32) if kind == "f32" else formats.narrow(x, kind) for x in (a, b)]
    got = apply(f"{name}{nan}.xorsign.abs.{kind}", *words)
    got = got.view(np.float32) if kind == "f32" else formats.widen(got, kind)
    choose = min if name == "min" else max
    for x, y, found in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        known = [abs(z) for z in (x, y) if z == z]
        if not known or (nan and len(known) < 2):
            assert found != found
            continue
        assert abs(found) == choose(known)
        if len(known) == 2:
            assert np.signbit(found) == (np.signbit(x) ^ np.signbit(y))


@pytest.mark.parametrize("kind", ["u64", "s64"])
def test_fields_of_64_bits(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 64, 600, dtype=np.uint64)
    position, length = (rng.integers(0, 70, 600).astype(np.uint32) for _ in range(2))
    position[:20], length[:20], length[20:40] = 0, 64, 0
    got = apply(f"bfe.{kind}", values, position, length).tolist()
    base = values[::-1].copy()
    inserted = apply("bfi.b64", values, base, position, length).tolist()
    rows = zip(values.tolist(), base.tolist(), position.tolist(), length.tolist(), strict=True)
    for i, (x, other, p, n) in enumerate(rows):
        sign = x >> min(p + n - 1, 63) & 1 if n and kind == "s64" else 0
        digits = [x >> (p + j) & 1 if p + j < 64 and j < n else sign for j in range(64)]
        assert got[i] == sum(digit << j for j, digit in enumerate(digits))
        mask = (((1 << n) - 1) << p) & (2**64 - 1)
        assert inserted[i] == (other & ~mask) | ((x << p) & mask)
