"""Every shape of matrix product against a product of whole matrices, operands placed by the ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stlm_kernels import ptx
from stlm_kernels.ptx import PtxError

pytestmark = pytest.mark.lanes("compiled")
DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "s8": torch.int8,
    "u8": torch.uint8, "f32": torch.float32, "f64": torch.float64, "s32": torch.int32,
}  # fmt: skip


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


def small_integers(*shape: int, kind: str, seed: int = 0) -> Tensor:
    """Numbers whose sums every kind holds exactly, so that products may be compared by bits."""
    generator = torch.Generator().manual_seed(seed)
    low = 0 if kind == "u8" else -3
    return torch.randint(low, 4, shape, generator=generator).to(DTYPES[kind])


def placed(x: Tensor, lanes: Any, registers: Any, parts: Any, bits: int) -> Tensor:
    """Elements as registers of 32 or 64 bits of each lane: (lanes, registers) of words."""
    size = x.element_size()
    count = int(np.max(registers)) + 1
    raw = np.zeros((int(np.max(lanes)) + 1, count, bits // 8 // size, size), np.uint8)
    raw[lanes, registers, parts] = x.contiguous().view(torch.uint8).numpy().reshape(*x.shape, size)
    return torch.from_numpy(raw.reshape(raw.shape[0], -1)).view(DTYPES["s32"])


def per_register(kind: str) -> int:
    return max(1, 4 // DTYPES[kind].itemsize)


def place_of_a(m: int, k: int, per: int) -> tuple[Any, Any, Any]:
    """Lane, register and part of each element of the left operand (PTX ISA, mma fragments)."""
    r, c = np.arange(m)[:, None], np.arange(k)[None, :]
    register = r % 16 // 8 + (2 if m > 8 else 1) * (c // per // 4)
    return r // 16 * 32 + r % 8 * 4 + c // per % 4, register, c % per + 0 * r


def place_of_b(k: int, per: int) -> tuple[Any, Any, Any]:
    r, c = np.arange(k)[:, None], np.arange(8)[None, :]
    return c * 4 + r // per % 4, r // per // 4 + 0 * c, r % per + 0 * c


def place_of_sums(m: int, n: int, per: int) -> tuple[Any, Any, Any]:
    r, c = np.arange(m)[:, None], np.arange(n)[None, :]
    index = c % 2 + 2 * (r % 16 // 8) + (4 if m > 8 else 2) * (c // 8)
    return r // 16 * 32 + r % 8 * 4 + c // 2 % 4, index // per, index % per


def multiplied(opcode: str, a: Tensor, b: Tensor, c: Tensor, kind: str, sums: str) -> Tensor:
    """a @ b + c by one `mma.sync` of a warp."""
    m, k = a.shape
    bits = 64 if kind == "f64" else 32
    per, per_sum = per_register(kind), per_register(sums)
    where = place_of_sums(m, 8, per_sum)
    operands = {
        "a": placed(a, *place_of_a(m, k, per), bits),
        "b": placed(b, *place_of_b(k, per), bits),
        "c": placed(c, *where, bits),
    }
    counts = {name: 4 * x.shape[1] * 8 // bits for name, x in operands.items()}
    lines = [f".reg .b{bits} %{name}<{count}>;" for name, count in counts.items()]
    for name, count in counts.items():
        lines += address(f"%p{name}", name, count * bits // 8)
        lines += [
            f"ld.global.b{bits} %{name}{i}, [%p{name}+{i * bits // 8}];" for i in range(count)
        ]
    registers = {
        name: "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"
        for name, count in counts.items()
    }
    lines.append(
        f"{opcode} {registers['c']}, {registers['a']}, {registers['b']}, {registers['c']};"
    )
    lines += [f"st.global.b{bits} [%pc+{i * bits // 8}], %c{i};" for i in range(counts["c"])]
    text = module("abc", 32, lines)
    ptx.execute(text, (1,), tuple(operands.values()), shared_bytes=0)
    return taken(operands["c"], where, sums, bits)


def address(register: str, parameter: str, size: int) -> list[str]:
    """The address of this thread's `size` bytes of a parameter."""
    return [
        f"ld.param.u64 {register}, [{parameter}]; mul.wide.u32 %at, %t, {size};",
        f"add.s64 {register}, {register}, %at;",
    ]


def module(parameters: str, threads: int, lines: list[str]) -> str:
    head = ", ".join(f".param .u64 {name}" for name in parameters)
    registers = ", ".join(f"%p{name}" for name in parameters)
    body = "\n".join(lines)
    return f""".visible .entry one({head}) .reqntid {threads} {{
    .reg .b32 %t; .reg .b64 %at, {registers}; mov.u32 %t, %tid.x;
    {body}
    ret; }}"""


def taken(words: Tensor, where: tuple[Any, Any, Any], sums: str, bits: int) -> Tensor:
    """The inverse of `placed`."""
    each = words.contiguous().view(DTYPES[sums]).view(len(words), -1, per_register(sums))
    return each[where]


MMA = [
    *(("bf16", "f32", 16, k) for k in (8, 16)),
    *(("f16", sums, 16, k) for sums in ("f32", "f16") for k in (8, 16)),
    *(("tf32", "f32", 16, k) for k in (4, 8)),
    *((kind, "s32", 16, k) for kind in ("s8", "u8") for k in (16, 32)),
    *(("f64", "f64", 16, k) for k in (4, 8, 16)),
    ("f64", "f64", 8, 4),
]


def opcode_of(kind: str, sums: str, m: int, k: int, extra: str = "") -> str:
    return f"mma.sync.aligned.m{m}n8k{k}.row.col{extra}.{sums}.{kind}.{kind}.{sums}"


@pytest.mark.parametrize(("kind", "sums", "m", "k"), MMA)
def test_products_of_a_warp(kind: str, sums: str, m: int, k: int) -> None:
    a, b = small_integers(m, k, kind=kind), small_integers(k, 8, kind=kind, seed=1)
    c = small_integers(m, 8, kind=sums, seed=2)
    got = multiplied(opcode_of(kind, sums, m, k), a, b, c, kind, sums)
    want = a.double() @ b.double() + c.double()
    assert torch.equal(got.double(), want)
    swapped = multiplied(opcode_of(kind, sums, m, k), a, b.flip(0), c, kind, sums)
    assert not torch.equal(swapped, got), "the order of the operand's rows counts"


@pytest.mark.parametrize("extra", ["", ".satfinite"])
def test_sums_of_integers_wrap_or_saturate(extra: str) -> None:
    a, b = torch.full((16, 32), 127, dtype=torch.int8), torch.full((32, 8), 127, dtype=torch.int8)
    b[:, 1] = -128
    c = torch.zeros(16, 8, dtype=torch.int32)
    c[:, 0], c[:, 1], c[0, 2] = 2**31 - 5, -(2**31) + 9, -(2**31)
    got = multiplied(opcode_of("s8", "s32", 16, 32, extra), a, b, c, "s8", "s32")
    exact = a.long() @ b.long() + c.long()
    want = exact.clamp(-(2**31), 2**31 - 1) if extra else (exact + 2**31) % 2**32 - 2**31
    assert torch.equal(got.long(), want)


def test_sums_in_fp16_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b, c = (
        torch.randn(*shape, generator=generator).half() for shape in ((16, 16), (16, 8), (16, 8))
    )
    c[0, 0], a[0], b[:, 0] = 65504, 64.0, 64.0  # beyond the largest
    # Rounded to fp32 first it would lie half way between two fp16 numbers.
    c[1, 1], a[1], a[1, :2], b[:2, 1] = 1.0, 0.0, torch.tensor([2**-11, 2**-14]), 2**-14
    b[0, 1] = 1.0
    got = multiplied(opcode_of("f16", "f16", 16, 16), a, b, c, "f16", "f16")
    with np.errstate(over="ignore"):
        want = (a.double() @ b.double() + c.double()).numpy().astype(np.float16)
    assert np.array_equal(got.numpy(), want)
    assert np.isinf(want[0, 0])


@pytest.mark.parametrize(
    "opcode",
    [
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
    ],
)
def test_other_products_are_refused(opcode: str) -> None:
    text = module("a", 32, [".reg .b32 %a<4>;", f"{opcode} {{%a0}}, {{%a1}}, {{%a2}}, {{%a3}};"])
    with pytest.raises(PtxError, match=r"mma\.sync.* is not known here"):
        ptx.execute(text, (1,), (torch.zeros(4),), shared_bytes=0)


def image(x: Tensor) -> tuple[bytes, int]:
    """Rows x depth as cores of 8 rows of 16 bytes, those of a group of 8 rows side by side.

    Returns:
        The bytes, and how many a group of rows has.
    """
    rows, depth = x.shape
    per = 16 // x.element_size()
    cores = x.reshape(rows // 8, 8, depth // per, per).permute(0, 2, 1, 3).contiguous()
    return cores.view(torch.uint8).numpy().tobytes(), 8 * depth * x.element_size()


def by_warpgroup(
    a: Tensor, b: Tensor, c: Tensor, kind: str, sums: str, *, in_registers: bool, flags: str
) -> Tensor:
    """a @ b + c by one `wgmma` with operands in shared memory without a swizzle."""
    (m, k), n = a.shape, b.shape[1]
    left, step = image(a)
    right, _ = image(b.T.contiguous())
    data = left + right
    data += bytes(-len(data) % 512)
    where = place_of_sums(m, n, per_register(sums))
    c_words, a_words = placed(c, *where, 32), placed(a, *place_of_a(m, k, per_register(kind)), 32)
    n_sums, n_left = c_words.shape[1], a_words.shape[1]
    fields = (128 >> 4) << 16 | (step >> 4) << 32
    listed = "{" + ", ".join(f"%c{i}" for i in range(n_sums)) + "}"
    held = "{" + ", ".join(f"%a{i}" for i in range(n_left)) + "}"
    lines = [
        f".reg .b32 %a<{n_left}>, %c<{n_sums}>, %w, %s; .reg .b64 %da, %db; .reg .pred %on;",
        *address("%pa", "a", 4 * n_left),
        *(f"ld.global.b32 %a{i}, [%pa+{4 * i}];" for i in range(n_left)),
        *address("%pc", "c", 4 * n_sums),
        *(f"ld.global.b32 %c{i}, [%pc+{4 * i}];" for i in range(n_sums)),
        *address("%pd", "d", 4),
        "shl.b32 %s, %t, 2;",
        *(
            f"ld.global.b32 %w, [%pd+{i}]; st.shared.b32 [%s+{i}], %w;"
            for i in range(0, len(data), 512)
        ),
        "fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned; mov.pred %on, -1;",
        f"mov.b64 %da, {fields}; mov.b64 %db, {fields | len(left) >> 4};",
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{sums}.{kind}.{kind} {listed},"
        f" {held if in_registers else '%da'}, %db, %on{flags};",
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        *(f"st.global.b32 [%pc+{4 * i}], %c{i};" for i in range(n_sums)),
    ]
    shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    ptx.execute(module("acd", 128, lines), (1,), (a_words, c_words, shared), shared_bytes=len(data))
    return taken(c_words, where, sums, 32)


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("n", [8, 24, 96, 256])
@pytest.mark.parametrize(
    ("kind", "sums", "flags"),
    [
        ("bf16", "f32", ", 1, 1, 0, 0"),
        ("f16", "f32", ", 1, 1, 0, 0"),
        ("f16", "f16", ", 1, 1, 0, 0"),
        ("tf32", "f32", ", 1, 1"),
        ("s8", "s32", ""),
        ("u8", "s32", ""),
    ],
)
def test_products_of_a_warpgroup(
    kind: str, sums: str, flags: str, n: int, in_registers: bool
) -> None:
    k = 32 // DTYPES[kind].itemsize
    a, b = small_integers(64, k, kind=kind), small_integers(k, n, kind=kind, seed=1)
    c = small_integers(64, n, kind=sums, seed=2)
    if in_registers:  # it has one flag less
        flags = flags.removesuffix(", 0") if flags.count("0") == 2 else flags
    got = by_warpgroup(a, b, c, kind, sums, in_registers=in_registers, flags=flags)
    assert torch.equal(got.double(), a.double() @ b.double() + c.double())


CASES = [
    ("s8", "s32"), ("f16", "f16"), ("f16", "f32"), ("bf16", "f32"), ("tf32", "f32"), ("f64", "f64"),
]  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [(16, 16, 32), (64, 64, 64), (64, 256, 32)])
@pytest.mark.parametrize(("kind", "sums"), CASES)
def test_products_as_triton_writes_them(
    kernels: Any, kind: str, sums: str, shape: tuple[int, int, int], arch: int
) -> None:
    import triton.language as tl

    m, n, k = shape
    if kind == "f64" and n > 64:
        n = 32
    a, b = small_integers(m, k, kind=kind), small_integers(k, n, kind=kind, seed=1)
    out = torch.empty(m, n, dtype=DTYPES[sums])
    names = {"s32": tl.int32, "f16": tl.float16, "f32": tl.float32, "f64": tl.float64}
    done = ptx.run(
        kernels.product, (1,), a, b, out, M=m, N=n, K=k, SUMS=names[sums], arch=arch, num_warps=4
    )
    assert "mma" in done.ptx
    assert torch.equal(out.double(), a.double() @ b.double())
