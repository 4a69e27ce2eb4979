"""Local memory, variables of a module and carries: what sines and random numbers need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ptx_launches import again, replaced
from torch import Tensor

from stlm_kernels import ptx
from stlm_kernels.ptx import Execution, Fault, PtxError
from stlm_kernels.ptx.code import Code
from stlm_kernels.ptx.decode import decode
from stlm_kernels.ptx.parse import parse

pytestmark = pytest.mark.lanes("compiled")
ARCHS = pytest.mark.parametrize("arch", [80, 90])


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


def sines(kernels: Any, arch: int = 90) -> tuple[Execution, Tensor, Tensor]:
    special = [1e5, -3e6, 1e20, -3.4e38, 2.0**40, math.inf, math.nan, 0.0]
    x = torch.cat([torch.linspace(-9e4, 4e5, 120), torch.tensor(special)])
    out = torch.full((2, 128), 7.0)
    done = ptx.run(kernels.sines, (1,), x, out, N=128, arch=arch, costs=True)
    return done, out, torch.stack([x.double().sin(), x.double().cos()]).float()


@ARCHS
def test_sines_of_large_angles(kernels: Any, arch: int) -> None:
    done, out, want = sines(kernels, arch)
    assert "st.local" in done.ptx
    torch.testing.assert_close(out, want, rtol=1e-6, atol=2e-7, equal_nan=True)


@ARCHS
def test_random_normals(kernels: Any, arch: int) -> None:
    """Against the transform of Box and Muller of the same bits, in fp64."""
    bits, out = torch.empty(2, 512, dtype=torch.int32), torch.empty(512)
    ptx.run(kernels.normals, (1,), bits, out, 11, N=512, arch=arch)
    first, second = torch.where(bits < 0, -bits - 1, bits).double() * 4.6566127342e-10
    radius = (-2 * first.clamp(min=1e-7).log()).sqrt()
    want = (radius * (2 * math.pi * second).cos()).float()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-6)


def test_accesses_of_local_memory_are_counted(kernels: Any) -> None:
    done, _, _ = sines(kernels)
    assert done.counts.costs is not None
    counts = done.counts.costs.counts
    stores = [
        int(count)
        for instruction, count in zip(done.program.instructions, done.counts.issued, strict=False)
        if instruction.opcode.startswith("st.local")
    ]
    assert counts["local_store_requests"] == sum(stores) > 0
    # The loop stores one word of each lane at one offset: four sectors of 32 bytes at most.
    assert 0 < counts["local_store_sectors"] <= 4 * counts["local_store_requests"]


@pytest.mark.parametrize(
    ("kind", "pattern", "new"),
    [
        ("outside", r"(ld\.local\.b32\s+%r\d+, \[%r\d+)\+24\]", r"\1+28]"),
        ("outside", r"st\.local\.b32\s+\[%r\d+\]", "st.local.b32 [__local_depot0-4]"),
        ("misaligned", r"(ld\.local\.b32\s+%r\d+, \[%r\d+)\+24\]", r"\1+22]"),
        ("unwritten", r"st\.local\.b32\s+\[%r\d+\+24\], %r\d+;", ""),
    ],
)
def test_faults_of_local_memory(kernels: Any, kind: str, pattern: str, new: str) -> None:
    done, _, _ = sines(kernels)
    with pytest.raises(Fault, match=rf"{kind}: sines, .*local memory|misaligned: sines"):
        again(done, replaced(pattern, new, 99))


def test_threads_have_local_memory_of_their_own() -> None:
    """Each stores its index where every other does, after them all, and reads it back by halves."""
    text = """.visible .entry own(.param .u64 out) .reqntid 64 {
    .local .align 2 .b8 first; .local .align 4 .b16 pair[2];
    .reg .b32 %t, %c, %low, %high; .reg .b64 %o, %at;
    ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x;
    mad.lo.u32 %t, %c, 64, %t; mul.wide.u32 %at, %t, 8; add.s64 %o, %o, %at;
    mad.lo.u32 %t, %t, 65536, %t; st.local.b8 [first], %c; st.local.b32 [pair], %t; bar.sync 0;
    ld.local.u16 %low, [pair]; ld.local.u16 %high, [pair+2];
    st.global.v2.b32 [%o], {%low, %high}; ret; }"""
    out = torch.zeros(3 * 64, 2, dtype=torch.int32)
    ptx.execute(text, (3,), (out,), shared_bytes=0)
    assert torch.equal(out, torch.arange(3 * 64, dtype=torch.int32)[:, None].expand(-1, 2))


def test_addresses_without_a_space_are_refused(kernels: Any) -> None:
    done, _, _ = sines(kernels)
    with pytest.raises(PtxError, match=r"ld\.b32 is not known here"):
        again(done, replaced(r"ld\.local\.b32", "ld.b32", 99))


def test_a_wrong_table_changes_sines(kernels: Any) -> None:
    """The table of 2 / pi is a variable of the module."""
    done, out, want = sines(kernels)
    again(done, replaced(r"= \{65, 144, 67", "= {65, 144, 68"))
    assert torch.allclose(out, want, rtol=1e-6, atol=2e-7, equal_nan=True)  # its last digits
    again(done, replaced(r"(= \{65, 144.*), 162\}", r"\1, 163}"))
    assert not torch.allclose(out, want, rtol=1e-6, atol=2e-7, equal_nan=True)


def test_a_lost_carry_changes_sines(kernels: Any) -> None:
    done, out, want = sines(kernels)
    again(done, replaced(r"madc\.hi\.u32", "mad.hi.u32", 99))
    assert not torch.allclose(out, want, rtol=1e-6, atol=2e-7, equal_nan=True)


NUMBERS = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678]
"""Words at which carries begin or end."""


@pytest.mark.parametrize("operation", ["add", "sub"])
def test_carries_by_brute_force(operation: str) -> None:
    """Sums and differences of 96 bits from words of 32, by Python's integers."""
    text = f""".visible .entry wide(.param .u64 x, .param .u64 out) .reqntid 512 {{
    .reg .b32 %t, %a<3>, %b<3>, %c<3>; .reg .b64 %x, %o, %at;
    ld.param.u64 %x, [x]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x;
    mul.wide.u32 %at, %t, 24; add.s64 %x, %x, %at;
    mul.wide.u32 %at, %t, 12; add.s64 %o, %o, %at;
    ld.global.b32 %a0, [%x]; ld.global.b32 %a1, [%x+4]; ld.global.b32 %a2, [%x+8];
    ld.global.b32 %b0, [%x+12]; ld.global.b32 %b1, [%x+16]; ld.global.b32 %b2, [%x+20];
    {operation}.cc.u32 %c0, %a0, %b0; {operation}c.cc.u32 %c1, %a1, %b1;
    {operation}c.u32 %c2, %a2, %b2;
    st.global.b32 [%o], %c0; st.global.b32 [%o+4], %c1; st.global.b32 [%o+8], %c2; ret; }}"""
    rng = np.random.default_rng(0)
    words = rng.choice(np.array(NUMBERS, np.uint32), (512, 2, 3))
    x, out = torch.from_numpy(words.view(np.int32)), torch.zeros(512, 3, dtype=torch.int32)
    ptx.execute(text, (1,), (x, out), shared_bytes=0)
    numbers = [[number_of(one) for one in pair] for pair in words]
    want = [a + b if operation == "add" else a - b for a, b in numbers]
    got = [number_of(row) for row in out.numpy().view(np.uint32)]
    assert got == [x % 2**96 for x in want]


def test_wide_products_with_carries() -> None:
    """Products of 64 bits from words of 32: each carry is of the instruction before."""
    text = """.visible .entry wide(.param .u64 x, .param .u64 out) .reqntid 512 {
    .reg .b32 %t, %a<2>, %b<2>, %c<4>; .reg .b64 %x, %o, %at;
    ld.param.u64 %x, [x]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x;
    mul.wide.u32 %at, %t, 16; add.s64 %x, %x, %at; add.s64 %o, %o, %at;
    ld.global.v2.b32 {%a0, %a1}, [%x]; ld.global.v2.b32 {%b0, %b1}, [%x+8];
    mul.lo.u32 %c0, %a0, %b0; mul.hi.u32 %c1, %a0, %b0;
    mad.lo.cc.u32 %c1, %a1, %b0, %c1; madc.hi.u32 %c2, %a1, %b0, 0;
    mad.lo.cc.u32 %c1, %a0, %b1, %c1; madc.hi.cc.u32 %c2, %a0, %b1, %c2; addc.u32 %c3, 0, 0;
    mad.lo.cc.u32 %c2, %a1, %b1, %c2; madc.hi.u32 %c3, %a1, %b1, %c3;
    st.global.v4.b32 [%o], {%c0, %c1, %c2, %c3}; ret; }"""
    rng = np.random.default_rng(1)
    words = rng.choice(np.array(NUMBERS, np.uint32), (512, 2, 2))
    x, out = torch.from_numpy(words.view(np.int32)), torch.zeros(512, 4, dtype=torch.int32)
    ptx.execute(text, (1,), (x, out), shared_bytes=0)
    got = [number_of(row) for row in out.numpy().view(np.uint32)]
    assert got == [number_of(a) * number_of(b) for a, b in words]


def number_of(words: np.ndarray) -> int:
    """The number of its words, low first."""
    return sum(int(word) << 32 * i for i, word in enumerate(words))


def test_chains_follow_the_carry() -> None:
    text = """.visible .entry one() .reqntid 32 { .reg .b32 %a<4>;
    add.cc.u32 %a0, %a1, %a1; addc.u32 %a2, %a3, %a3; ret; }"""
    code: Code = decode(parse(text))
    assert set(code.writes[0]) & set(code.reads[1]), "the second needs the first"
    assert not set(code.writes[1]) & set(code.reads[0])
