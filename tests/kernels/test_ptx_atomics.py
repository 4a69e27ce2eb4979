"""Every atomic of triton's language on every dtype that it takes, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ptx_launches import again, replaced
from torch import Tensor

from stlm_kernels import ptx
from stlm_kernels.ptx import Execution, Fault, PtxError

pytestmark = pytest.mark.lanes("compiled")
ARCHS = pytest.mark.parametrize("arch", [80, 90])
INTEGERS = (torch.int32, torch.int64, torch.uint32, torch.uint64)
WIDE = (*INTEGERS, torch.float32, torch.float64)
SMALL = (torch.float16, torch.bfloat16)
SIGNED = {torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Dtypes that torch computes with instead; bits of sums are the same."""


def by_bits(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    integer = {4: torch.int32, 8: torch.int64}
    return lambda a, b: function(
        a.view(integer[a.itemsize]), b.view(integer[a.itemsize])
    ).view(a.dtype)  # fmt: skip


def as_signed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(a: Tensor, b: Tensor) -> Tensor:
        dtype = SIGNED.get(a.dtype, a.dtype)
        return function(a.view(dtype), b.view(dtype)).view(a.dtype)

    return apply


def by_order(largest: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The larger or the smaller; torch does not compare unsigned numbers of 64 bits."""

    def apply(a: Tensor, b: Tensor) -> Tensor:
        def keys(x: Tensor) -> Tensor:
            dtype = SIGNED.get(x.dtype)
            return x if dtype is None else x.view(dtype) ^ torch.iinfo(dtype).min

        picks = keys(a) > keys(b) if largest else keys(a) < keys(b)
        dtype = SIGNED.get(a.dtype, a.dtype)
        return torch.where(picks, a.view(dtype), b.view(dtype)).view(a.dtype)

    return apply


FUNCTIONS: dict[str, tuple[tuple[torch.dtype, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "add": ((*WIDE, *SMALL), as_signed(torch.add)),
    "max": (WIDE, by_order(largest=True)),
    "min": (WIDE, by_order(largest=False)),
    "and": (WIDE, by_bits(torch.bitwise_and)),
    "or": (WIDE, by_bits(torch.bitwise_or)),
    "xor": (WIDE, by_bits(torch.bitwise_xor)),
    "xchg": (WIDE, lambda a, b: b),
}


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether all bits are the same, those of NaN too."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def numbers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    signed = SIGNED.get(dtype, dtype)
    limits = torch.iinfo(signed)
    return torch.randint(
        limits.min, limits.max, (n,), generator=generator, dtype=signed
    ).view(dtype)  # fmt: skip


def launched(
    name: str, x: Tensor, out: Tensor, arch: int, times: int = 1, last: int | None = None,
    sem: str = "acq_rel", scope: str = "gpu", **options: Any,
) -> tuple[Execution, Tensor]:  # fmt: skip
    """The launch, and what stood in `out` before each element's turn."""
    from helpers.ptx_atomics import update

    before = torch.zeros_like(x)
    last = len(x) if last is None else last
    done = ptx.run(
        update, (1,), x, out, before, NAME=name, SEM=sem, SCOPE=scope, N=len(x), TIMES=times,
        LAST=last, arch=arch, num_warps=4, **options,
    )  # fmt: skip
    return done, before


@ARCHS
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in FUNCTIONS for dtype in FUNCTIONS[name][0]]
)
def test_atomics_in_places_of_their_own(name: str, dtype: torch.dtype, arch: int) -> None:
    """Atomics with and without a mask: without one several elements may go in one instruction."""
    x, first = numbers(1024, dtype, 0), numbers(1024, dtype, 1)
    want = FUNCTIONS[name][1](first, x)
    for last in (1024, 1021):
        out = first.clone()
        _, before = launched(name, x, out, arch, last=last)
        assert same(out[:last], want[:last])
        assert same(out[last:], first[last:])
        assert same(before[:last], first[:last])


@ARCHS
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in FUNCTIONS for dtype in FUNCTIONS[name][0] if name != "xchg"],
)
def test_atomics_in_one_place(name: str, dtype: torch.dtype, arch: int) -> None:
    """Four elements each; sums are of small whole numbers, so their order does not matter."""
    x = torch.randint(0, 9, (512,)).to(dtype) if name == "add" else numbers(512, dtype, 0)
    first = torch.randint(0, 9, (128,)).to(dtype) if name == "add" else numbers(128, dtype, 1)
    out = first.clone()
    launched(name, x, out, arch, times=4)
    want = first
    for column in x.view(128, 4).unbind(1):
        want = FUNCTIONS[name][1](want, column.contiguous())
    assert same(out, want)


@ARCHS
@pytest.mark.parametrize("dtype", WIDE)
def test_exchanges_in_one_place(dtype: torch.dtype, arch: int) -> None:
    """Each finds what the one before it left: what stands there in the end is nowhere else."""
    x, first = numbers(256, dtype, 0), numbers(64, dtype, 1)
    out = first.clone()
    _, before = launched("xchg", x, out, arch, times=4)
    seen = torch.cat([before.view(64, 4), out.view(64, 1)], 1).tolist()
    given = torch.cat([x.view(64, 4), first.view(64, 1)], 1).tolist()
    assert [sorted(row) for row in seen] == [sorted(row) for row in given]


@ARCHS
@pytest.mark.parametrize("dtype", [*INTEGERS[:2], torch.int16, torch.float32, *SMALL])
def test_compare_and_swap(dtype: torch.dtype, arch: int) -> None:
    x = torch.arange(1, 257).to(dtype)
    out = x.clone()
    out[::3] = 99
    first = out.clone()
    _, before = launched("cas", x, out, arch)
    assert torch.equal(before, first)
    assert torch.equal(out, torch.where(first == x, -x, first))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", SMALL)
def test_sums_of_16_bits_are_rounded_once_and_keep_what_is_small(
    dtype: torch.dtype, arch: int
) -> None:
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, -1.0]
    tiny = torch.finfo(dtype).smallest_normal * torch.tensor([0.25, -0.5, 0.75])
    values = torch.cat([torch.tensor(special), tiny, torch.randn(22)]).to(dtype)
    x, first = values.repeat(32), values.repeat_interleave(32)
    out = first.clone()
    done, _ = launched("add", x, out, arch)
    if arch >= 90:
        assert f"add.noftz.v8.{'f16' if dtype == torch.float16 else 'bf16'}" in done.ptx
    want = (first.double() + x.double()).to(dtype)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@ARCHS
def test_sums_of_fp32_on_global_memory_flush_what_is_subnormal(arch: int) -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([0.5 * tiny, -0.75 * tiny, tiny, 1.5 * tiny] * 32)
    out = torch.tensor([0.0, -0.0, -0.5 * tiny, -tiny] * 32)
    launched("add", x, out, arch)
    assert torch.equal(out, torch.tensor([0.0, -0.0, tiny, 0.0] * 32))
    assert torch.equal(out[1:2].signbit(), torch.tensor([True]))


@ARCHS
@pytest.mark.parametrize("sem", ["acquire", "release", "acq_rel", "relaxed"])
@pytest.mark.parametrize("scope", ["cta", "gpu", "sys"])
def test_orders_and_scopes(sem: str, scope: str, arch: int) -> None:
    for name, dtype in (("add", torch.bfloat16), ("max", torch.float32), ("cas", torch.int32)):
        x = torch.arange(1, 129).to(dtype)
        out = x.clone()
        launched(name, x, out, arch, sem=sem, scope=scope)
        assert torch.equal(out, {"add": 2 * x, "max": x, "cas": -x}[name])


@pytest.mark.parametrize(
    "opcode",
    [
        "atom.global.gpu.acq_rel.add.noftz.v8.f16x2",
        "atom.global.gpu.acq_rel.min.noftz.v8.f16",
        "atom.global.gpu.acq_rel.add.v8.f16",
        "atom.global.gpu.acq_rel.add.noftz.v8.e4m3",
        "atom.global.gpu.acq_rel.inc.u32",
        "atom.global.gpu.acq_rel.cas.b128",
        "red.async.global.add.u32",
    ],
)
def test_other_atomics_are_refused(opcode: str) -> None:
    x = numbers(1024, torch.float16, 0)
    done, _ = launched("add", x, x.clone(), 90)
    pattern = r"atom\.global\.gpu\.acq_rel\.add\.noftz\.v8\.f16"
    with pytest.raises(PtxError, match=rf"{opcode} is not known here \(ptx_atomics.py:\d+, PTX"):
        again(done, replaced(pattern, opcode))


def test_atomics_on_memory_that_nothing_wrote() -> None:
    with ptx.executing() as session:
        out = torch.empty(128)
        with pytest.raises(Fault, match=r"unwritten: update.*of argument 1 \(128,\)"):
            launched("add", torch.ones(128), out, 90, fresh=session.shadows())
        out.zero_()
        launched("add", torch.ones(128), out, 90, fresh=session.shadows())
        session.assert_written(out)


def test_atomics_outside_and_misaligned() -> None:
    x = numbers(1024, torch.float16, 0)
    done, _ = launched("add", x, x.clone(), 90)
    place = r"(atom\.[^[]*\[ %rd\d+ \+ )0"
    with pytest.raises(Fault, match="outside: update"):
        again(done, replaced(place, r"\g<1>2048"))
    with pytest.raises(Fault, match="misaligned: update"):
        again(done, replaced(place, r"\g<1>2"))


def test_atomics_are_counted() -> None:
    x, out = torch.ones(1024), torch.zeros(256)
    done, _ = launched("add", x, out, 90, times=4, costs=True)
    assert done.counts.costs is not None
    counts = done.counts.costs.counts
    assert counts["global_atomic_requests"] == 1024 // 32
    assert counts["global_atomic_sectors"] == 1024 // 32
    assert done.counts.costs.dram_bytes() == 2 * 1024 * 4 + 2 * 256 * 4
