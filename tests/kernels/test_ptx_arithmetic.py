"""The executor's arithmetic against torch, brute force and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from stlm_kernels.ptx import formats, lanes, matrix
from stlm_kernels.ptx.arithmetic import function_of

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
SPECIAL = np.array(
    [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, 3.4e38, 65504.0, 65520.0, 6e-8],
    np.float32,
)


def apply(opcode: str, *operands: np.ndarray) -> np.ndarray:
    function = function_of(opcode)
    assert function is not None, opcode
    with np.errstate(all="ignore"):
        return function(*operands)


def bits(values: object, dtype: type = np.float32) -> np.ndarray:
    array = np.asarray(values, dtype)
    return array.view(f"u{array.dtype.itemsize}")


def random_singles(count: int, seed: int = 0) -> np.ndarray:
    """Every kind of fp32 number, as bits."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([SPECIAL.view(np.uint32), drawn])


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_all_16_bit_floats_widen_and_narrow_as_torch(kind: str, dtype: torch.dtype) -> None:
    stored = torch.from_numpy(ALL_16.view(np.int16).copy()).view(dtype)
    wide = apply(f"cvt.f32.{kind}", ALL_16).view(np.float32)
    np.testing.assert_array_equal(wide, stored.float().numpy())
    back = apply(f"cvt.rn.{kind}.f32", wide.view(np.uint32))
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(back[numbers], ALL_16[numbers])
    assert np.isnan(formats.widen(back[~numbers], kind)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_rounds_as_torch(kind: str, dtype: torch.dtype) -> None:
    source = random_singles(200_000)
    # Numbers half way between two 16-bit floats too.
    source = np.concatenate(
        [source, source & np.uint32(0xFFFF8000), source & np.uint32(0xFFFFF000)]
    )
    got = formats.widen(apply(f"cvt.rn.{kind}.f32", source), kind)
    want = torch.from_numpy(source.view(np.float32).copy()).to(dtype).float().numpy()
    np.testing.assert_array_equal(got, want)
    both = apply(f"cvt.rn.{kind}x2.f32", source, source[::-1].copy())
    np.testing.assert_array_equal(formats.widen((both >> 16).astype(np.uint16), kind), want)
    np.testing.assert_array_equal(formats.widen(both.astype(np.uint16), kind), want[::-1])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_towards_zero_never_grows(kind: str) -> None:
    values = random_singles(50_000, 1).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 6e4)]
    cut = formats.widen(apply(f"cvt.rz.{kind}.f32", values.view(np.uint32)), kind)
    near = formats.widen(apply(f"cvt.rn.{kind}.f32", values.view(np.uint32)), kind)
    assert (np.abs(cut) <= np.abs(values)).all()
    fits = np.abs(near) <= np.abs(values)
    np.testing.assert_array_equal(cut[fits], near[fits])


def test_fma_rounds_once() -> None:
    """Against exact fractions, with sums that lie half way between two fp32 numbers."""
    rng = np.random.default_rng(2)
    a = rng.integers(1 << 23, 1 << 24, 300).astype(np.float32)
    b = rng.integers(1 << 23, 1 << 24, 300).astype(np.float32)
    halves = np.float32(2.0) ** rng.integers(-30, 23, 300).astype(np.float32)
    c = np.where(rng.random(300) < 0.5, halves, -halves).astype(np.float32)
    got = apply("fma.rn.f32", *(x.view(np.uint32) for x in (a, b, c))).view(np.float32)
    for x, y, z, found in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = np.nextafter(found, np.float32(0)), np.nextafter(found, np.float32(np.inf))
        off = abs(Fraction(float(found)) - exact)
        assert off <= min(abs(Fraction(float(n)) - exact) for n in (below, above))
        if off == abs(Fraction(float(above)) - exact) or off == abs(Fraction(float(below)) - exact):
            assert int(found.view(np.uint32)) % 2 == 0, "a tie goes to the even number"


def test_fma_is_not_two_roundings() -> None:
    a = np.float32(1 + 2.0**-12)
    got = apply("fma.rn.f32", bits([a]), bits([a]), bits([-np.float32(a * a)])).view(np.float32)
    assert got[0] == 2.0**-24


def test_fma_of_sums_that_fp64_rounds_to_a_tie() -> None:
    """Numbers next to a tie, above and below, that fp64 cannot tell from it."""
    unit = np.float32(2.0**-149)
    below_three_halves = np.float32(1.5 - 1.5 * 2.0**-22)
    a = np.float32([1.5, 1.5, 1.5, 1 + 2.0**-22])
    b = np.float32([(1 << 23) + 1] * 3 + [below_three_halves * np.float32(2.0**-149 * 2**40)])
    a[3] *= np.float32(2.0**-40)
    c = np.float32([2.0**-40, -(2.0**-40), 0, 1024 * unit])
    got = apply("fma.rn.f32", *(x.view(np.uint32) for x in (a, b, c))).view(np.float32)
    np.testing.assert_array_equal(got, np.float32([12582914, 12582913, 12582914, 1025 * unit]))


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_floats_to_integers_saturate(rounding: str) -> None:
    values = np.array([2.5, -2.5, 3.5, 1e20, -1e20, np.nan, -0.4], np.float32)
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](values)
    got = apply(f"cvt.{rounding}.s32.f32", values.view(np.uint32)).view(np.int32)
    want = [
        int(rounded[0]),
        int(rounded[1]),
        int(rounded[2]),
        2**31 - 1,
        -(2**31),
        0,
        int(rounded[6]),
    ]
    assert got.tolist() == want


def test_integers_widen_by_their_sign() -> None:
    assert apply("cvt.s64.s32", bits([-5], np.int32)).view(np.int64).tolist() == [-5]
    assert apply("cvt.u64.u32", bits([-5], np.int32)).tolist() == [2**32 - 5]
    assert apply("cvt.s16.s8", np.array([0x00FF], np.uint16)).view(np.int16).tolist() == [-1]
    assert apply("cvt.rn.f32.u64", np.array([2**64 - 1], np.uint64)).view(np.float32)[0] == 2.0**64


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integer_products(kind: str) -> None:
    width = int(kind[1:])
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 1 << 64, (2, 500), dtype=np.uint64).astype(f"u{width // 8}")
    numbers = raw.view(f"i{width // 8}") if kind[0] == "s" else raw
    exact = [int(a) * int(b) for a, b in zip(*numbers, strict=True)]
    low = apply(f"mul.lo.{kind}", *raw)
    high = apply(f"mul.hi.{kind}", *raw)
    assert low.tolist() == [x % (1 << width) for x in exact]
    assert high.tolist() == [(x >> width) % (1 << width) for x in exact]
    if width == 32:
        assert apply(f"mul.wide.{kind}", *raw).tolist() == [x % (1 << 64) for x in exact]


@pytest.mark.parametrize(("kind", "dtype"), [("s16x2", np.int16), ("u16x2", np.uint16)])
def test_pairs_of_16_bit_integers(kind: str, dtype: type) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 1 << 16, (2, 500, 2), dtype=np.uint16)
    packed = [x.reshape(-1).view(np.uint32) for x in (a, b)]
    for name, function in {"add": np.add, "sub": np.subtract, "max": np.maximum}.items():
        got = apply(f"{name}.{kind}", *packed).view(dtype)
        assert got.tolist() == function(a.view(dtype), b.view(dtype)).reshape(-1).tolist()


def test_division_truncates() -> None:
    a, b = bits([-7, 7, -7, 7], np.int32), bits([2, -2, -2, 2], np.int32)
    assert apply("div.s32", a, b).view(np.int32).tolist() == [-3, -3, 3, 3]
    assert apply("rem.s32", a, b).view(np.int32).tolist() == [-1, 1, -1, 1]


def test_shifts_beyond_the_width() -> None:
    count = np.array([0, 1, 31, 32, 40], np.uint32)
    value = np.full(5, 0x80000001, np.uint32)
    assert apply("shl.b32", value, count).tolist() == [0x80000001, 2, 0x80000000, 0, 0]
    assert apply("shr.u32", value, count).tolist() == [0x80000001, 0x40000000, 1, 0, 0]
    assert apply("shr.s32", value, count).tolist() == [
        0x80000001, 0xC0000000, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF,
    ]  # fmt: skip
    low, high = np.full(5, 0x12345678, np.uint32), np.full(5, 0x9ABCDEF0, np.uint32)
    whole = 0x9ABCDEF012345678
    assert apply("shf.r.wrap.b32", low, high, count).tolist() == [
        (whole >> (n % 32)) & 0xFFFFFFFF for n in count.tolist()
    ]
    assert apply("shf.l.clamp.b32", low, high, count).tolist() == [
        ((whole << min(n, 32)) >> 32) & 0xFFFFFFFF for n in count.tolist()
    ]


def test_lop3_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    a, b, c = rng.integers(0, 1 << 32, (3, 20), dtype=np.uint64).astype(np.uint32)
    for table in range(256):
        got = apply("lop3.b32", a, b, c, np.array([table], np.uint32))
        want = np.zeros(20, np.uint32)
        for bit in range(32):
            row = ((a >> bit & 1) << 2) | ((b >> bit & 1) << 1) | (c >> bit & 1)
            want |= ((table >> row) & 1).astype(np.uint32) << np.uint32(bit)
        np.testing.assert_array_equal(got, want)


def test_prmt_by_brute_force() -> None:
    a, b = np.uint32(0x83426180), np.uint32(0xF7E6D5C4)
    source = [*int(a).to_bytes(4, "little"), *int(b).to_bytes(4, "little")]
    selectors = np.random.default_rng(5).integers(0, 1 << 16, 2000).astype(np.uint32)
    got = apply("prmt.b32", np.full(2000, a), np.full(2000, b), selectors)
    for selector, found in zip(selectors.tolist(), got.tolist(), strict=True):
        chosen = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            chosen.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        assert found == int.from_bytes(bytes(chosen), "little")


def test_bit_fields() -> None:
    rng = np.random.default_rng(6)
    values = rng.integers(0, 1 << 32, 400, dtype=np.uint64).astype(np.uint32)
    position, length = (rng.integers(0, 36, 400).astype(np.uint32) for _ in range(2))
    got_u = apply("bfe.u32", values, position, length)
    got_s = apply("bfe.s32", values, position, length).view(np.int32)
    base = values[::-1].copy()
    inserted = apply("bfi.b32", values, base, position, length)
    for i, (x, p, n) in enumerate(
        zip(values.tolist(), position.tolist(), length.tolist(), strict=True)
    ):
        assert got_u[i] == (x >> p) & ((1 << n) - 1)
        sign_bit = x >> min(p + n - 1, 31) & 1 if n else 0
        digits = [x >> (p + j) & 1 if p + j < 32 and j < n else sign_bit for j in range(32)]
        assert got_s[i] == int.from_bytes(
            sum(d << j for j, d in enumerate(digits)).to_bytes(4, "little"), "little", signed=True
        )
        mask = (((1 << n) - 1) << p) & 0xFFFFFFFF
        assert inserted[i] == (int(base[i]) & ~mask) | ((x << p) & mask)


def test_counts_of_bits() -> None:
    values = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0], np.uint32)
    assert apply("popc.b32", values).tolist() == [0, 1, 1, 32, 4]
    assert apply("clz.b32", values).tolist() == [32, 31, 0, 0, 24]
    assert apply("brev.b32", values).tolist() == [0, 0x80000000, 1, 0xFFFFFFFF, 0x0F000000]


def test_comparisons_with_nan() -> None:
    a, b = bits([1.0, np.nan]), bits([2.0, 2.0])
    for name, want in {
        "lt": [True, False], "ltu": [True, True], "ne": [True, False], "neu": [True, True],
        "eq": [False, False], "equ": [False, True], "num": [True, False], "nan": [False, True],
        "ge": [False, False], "geu": [False, True],
    }.items():  # fmt: skip
        assert apply(f"setp.{name}.f32", a, b).tolist() == want, name
    assert apply("max.f32", a, b).view(np.float32).tolist() == [2.0, 2.0]
    assert np.isnan(apply("max.NaN.f32", a, b).view(np.float32)).tolist() == [False, True]


def test_flushing_subnormals() -> None:
    tiny = bits([1e-40, -1e-40, 1e-30])
    got = apply("add.ftz.f32", tiny, bits([0.0, 0.0, 0.0])).view(np.float32)
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] == np.float32(1e-30)


@pytest.mark.parametrize(
    "opcode",
    ["add.f32", "add.rn.f32", "sub.f32", "mul.f32", "mul.rn.ftz.f32", "fma.rn.f32", "add.ftz.f32"],
)
def test_pairs_of_singles(opcode: str) -> None:
    """Each half is as by the instruction for one number (sm_100)."""
    count = 3 if opcode.startswith("fma") else 2
    operands = [random_singles(4987, seed) for seed in range(count)]
    operands[1][::5] = operands[0][::5] ^ np.uint32(1 << 31)
    want = apply(opcode, *operands)
    pairs = [x.view(np.uint64) for x in operands]
    got = apply(f"{opcode}x2", *pairs).view(np.uint32)
    np.testing.assert_array_equal(got, want)
    for i in range(count):  # a register that is the same for all threads
        same = [x[:1] if i == j else x for j, x in enumerate(pairs)]
        all_of_it = [x.repeat(len(pairs[0])) if len(x) == 1 else x for x in same]
        got = apply(f"{opcode}x2", *same).view(np.uint32)
        want = apply(opcode, *(x.view(np.uint32) for x in all_of_it))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_sums_in_fp32_of_16_bit_floats(kind: str) -> None:
    """All operands but the last are widened (sm_100)."""
    count = len(ALL_16)
    narrow = [ALL_16, np.random.default_rng(1).permutation(ALL_16)]
    wide = [apply(f"cvt.f32.{kind}", x) for x in narrow]
    last = random_singles(count, 2)[:count]
    for name in ("add", "add.rn", "sub", "sub.rn"):
        got = apply(f"{name}.f32.{kind}", narrow[0], last)
        np.testing.assert_array_equal(
            got.view(np.float32), apply(f"{name}.f32", wide[0], last).view(np.float32)
        )
    got = apply(f"fma.rn.f32.{kind}", *narrow, last)
    want = apply("fma.rn.f32", *wide, last)
    np.testing.assert_array_equal(got.view(np.float32), want.view(np.float32))


@pytest.mark.parametrize("name", ["max.f32", "min.f32", "max.NaN.f32", "min.ftz.NaN.f32"])
def test_extrema_of_three(name: str) -> None:
    a, b, c = (random_singles(3000, seed) for seed in range(3))
    before = c.copy()
    want = apply(name, apply(name, a, b), c).view(np.float32)
    np.testing.assert_array_equal(apply(name, a, b, c).view(np.float32), want)
    np.testing.assert_array_equal(c, before)
    want = apply(name, apply(name, a, b), c[:1]).view(np.float32)
    np.testing.assert_array_equal(apply(name, a, b, c[:1]).view(np.float32), want)


def test_sums_of_products_rounded_down() -> None:
    a, b, c = (random_singles(3000, seed).view(np.float32) for seed in range(3))
    b[::7], c[::3] = np.float32(1), -a[::3]
    c[::21] *= np.float32(1.0000001)
    got = apply("fma.rm.f32", *(x.view(np.uint32) for x in (a, b, c))).view(np.float32)
    for x, y, z, value in zip(*(v.tolist() for v in (a, b, c, got)), strict=True):
        if not np.isfinite([x, y, z]).all():
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if np.isinf(value):
            assert value < 0
            assert exact < Fraction(float(np.finfo(np.float32).min))
            continue
        assert Fraction(value) <= exact
        if value < np.finfo(np.float32).max:
            assert Fraction(float(np.nextafter(np.float32(value), np.float32(np.inf)))) > exact


def test_conversions_between_0_and_1() -> None:
    values = np.array([-1.0, 0.25, 2.0, np.nan, np.inf, -np.inf, 1e-40], np.float32)
    got = apply("cvt.sat.f32.f32", values.view(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(got, np.float32([0, 0.25, 1, 0, 1, 0, 1e-40]))
    got = apply("cvt.ftz.sat.f32.f32", values.view(np.uint32)).view(np.float32)
    assert got[-1] == 0
    got = apply("cvt.ftz.f32.f32", values.view(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(got[:-1], values[:-1])
    assert function_of("cvt.sat.f16.f32") is None


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("sqrt.rn.f32", np.sqrt),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_approximations(opcode: str, exact: object) -> None:
    values = np.linspace(0.01, 30, 1000, dtype=np.float32)
    got = apply(opcode, values.view(np.uint32)).view(np.float32)
    np.testing.assert_allclose(got, exact(values.astype(np.float64)), rtol=2**-23)  # type: ignore[operator]


def test_what_is_not_known_is_none() -> None:
    for opcode in (
        "add.rz.f32",
        "cvt.rn.satfinite.e4m3x2.f32",
        "fma.rn.sat.f32",
        "mad.f32",
        "dp4a.u32",
        "setp.lt.f16x2",
        "add.cc.u32",
        "prmt.b32.f4e",
        "add.f64.f32",
        "add.rz.f32.f16",
        "mul.f32.f16",
        "fma.rn.f32.s16",
        "add.f32.f16x2",
    ):
        assert function_of(opcode) is None, opcode


SHUFFLES = {
    "up": lambda lane, b: lane - b if lane >= b else lane,
    "down": lambda lane, b: lane + b if lane + b < 32 else lane,
    "bfly": lambda lane, b: lane ^ b,
    "idx": lambda lane, b: b,
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(mode: str) -> None:
    value = np.arange(64, dtype=np.uint32)
    for b in (0, 1, 5, 16, 31):
        c = np.full(64, 0 if mode == "up" else 31, np.uint32)
        got, _ = lanes.shuffle(mode, value, np.full(64, b, np.uint32), c)
        want = [32 * (i // 32) + SHUFFLES[mode](i % 32, b) for i in range(64)]
        assert got.tolist() == want


def test_shuffles_within_segments() -> None:
    value = np.arange(32, dtype=np.uint32)
    c = np.full(32, (24 << 8) | 31, np.uint32)  # segments of 8
    got, in_range = lanes.shuffle("down", value, np.full(32, 3, np.uint32), c)
    assert got.tolist() == [i + 3 if i % 8 < 5 else i for i in range(32)]
    assert in_range.tolist() == [i % 8 < 5 for i in range(32)]


def as_registers(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint32)[..., 0]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("depth", [8, 16])
def test_fragments_of_16_bit_products(kind: str, depth: int) -> None:
    """Fragments placed by the ISA's formulas, element by element, make the matrix product."""
    rng = np.random.default_rng(7)
    raw_a = formats.narrow(rng.standard_normal((16, depth)), kind)
    raw_b = formats.narrow(rng.standard_normal((depth, 8)), kind)
    shape = matrix.Shape(16, 8, depth, kind)
    registers_a, registers_b = [], []
    lane = np.arange(32)
    for i in range(depth // 4):
        row = lane // 4 + 8 * (i % 2)
        column = lane % 4 * 2 + 8 * (i // 2)
        pair = np.stack([raw_a[row, column], raw_a[row, column + 1]], -1)
        registers_a.append(as_registers(pair)[None])
    for i in range(depth // 8):
        k = lane % 4 * 2 + 8 * i
        pair = np.stack([raw_b[k, lane // 4], raw_b[k + 1, lane // 4]], -1)
        registers_b.append(as_registers(pair)[None])
    a, b = matrix.operand_a(registers_a, shape), matrix.operand_b(registers_b, shape)
    np.testing.assert_array_equal(a[0], formats.widen(raw_a, kind))
    np.testing.assert_array_equal(b[0], formats.widen(raw_b, kind))
    sums = rng.standard_normal((1, 16, 8)).astype(np.float32)
    total = matrix.product(a, b, sums)
    np.testing.assert_allclose(total[0], a[0] @ b[0] + sums[0], rtol=1e-5, atol=1e-5)


def test_fragments_of_tf32_products() -> None:
    rng = np.random.default_rng(8)
    a = rng.standard_normal((16, 8)).astype(np.float32)
    b = rng.standard_normal((8, 8)).astype(np.float32)
    shape, lane = matrix.Shape(16, 8, 8, "tf32"), np.arange(32)
    registers_a = [
        a[lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)].view(np.uint32)[None] for i in range(4)
    ]
    registers_b = [b[lane % 4 + 4 * i, lane // 4].view(np.uint32)[None] for i in range(2)]
    cut = (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    np.testing.assert_array_equal(matrix.operand_a(registers_a, shape)[0], cut)
    cut = (b.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    np.testing.assert_array_equal(matrix.operand_b(registers_b, shape)[0], cut)


def test_accumulators_go_there_and_back() -> None:
    values = np.arange(2 * 16 * 24, dtype=np.float32).reshape(2, 16, 24)
    registers = matrix.registers_of(values, 12)
    np.testing.assert_array_equal(matrix.accumulator(registers, 24), values)
    # Lane 5 holds row 1, columns 2 and 3 in its first two registers, row 9 in the next.
    assert [float(r.view(np.float32)[0, 5]) for r in registers[:4]] == [26.0, 27.0, 218.0, 219.0]


def test_matrix_loads_and_stores_are_inverse() -> None:
    words = np.arange(4 * 64, dtype=np.uint16).reshape(1, 4, 8, 8)
    for transposed in (False, True):
        fragments = lanes.fragments_of(words, transposed)
        np.testing.assert_array_equal(lanes.matrices_of(fragments, transposed), words)
    plain = lanes.fragments_of(words, False)[0]
    assert plain[5] == int(words[0, 0, 1, 2]) | int(words[0, 0, 1, 3]) << 16
    turned = lanes.fragments_of(words, True)[0]
    assert turned[5] == int(words[0, 0, 2, 1]) | int(words[0, 0, 3, 1]) << 16


@pytest.mark.parametrize(("mode", "units"), [(0, 1), (3, 2), (2, 4), (1, 8)])
def test_descriptors_read_what_was_laid_out(mode: int, units: int) -> None:
    """A K-major operand laid out row by row of its pattern, with the units of 16 bytes swizzled."""
    rows, depth, width = 32, 16, 16 * units
    stride, leading = (256, 128) if units == 1 else (8 * width, 0)
    descriptor = np.array(
        [1024 >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62], np.uint64
    )
    got = matrix.descriptor_offsets(descriptor, rows, depth, 2, depth_major=True)[0]
    for row in range(rows):
        for k in range(depth):
            if units == 1:
                place = 1024 + row // 8 * 256 + k // 8 * 128 + row % 8 * 16 + k % 8 * 2
            else:
                line = 1024 + row * width + k * 2
                unit = (line >> 4) ^ ((line >> 7) % units)
                place = unit << 4 | line & 15
            assert got[row, k] == place


def test_approximate_division_is_a_quotient() -> None:
    a, b = bits([1.0, -7.0, 0.0]), bits([3.0, 2.0, 5.0])
    got = apply("div.full.f32", a, b).view(np.float32)
    np.testing.assert_allclose(got, [1 / 3, -3.5, 0.0], rtol=2**-22)
