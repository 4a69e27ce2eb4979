"""Packs of instructions: the values and the order that the instructions have one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from stlm_kernels import ptx
from stlm_kernels.ptx import packs
from stlm_kernels.ptx.decode import decode
from stlm_kernels.ptx.parse import parse

THREADS = 64


def module(body: str) -> str:
    """Return a kernel that stores what `%r0` to `%r7` hold, eight words a thread."""
    lines = [
        ".entry test(.param .u64 test_0)", f".reqntid {THREADS} {{", ".reg .pred %p<4>;",
        ".reg .b32 %r<99>;", ".reg .b64 %rd<4>;", "ld.param.b64 %rd0, [test_0];",
        "mov.u32 %r90, %tid.x;", "mul.wide.u32 %rd1, %r90, 32;", "add.s64 %rd2, %rd0, %rd1;",
        body,
        *(f"st.global.b32 [%rd2+{4 * i}], %r{i};" for i in range(8)), "ret;", "}",
    ]  # fmt: skip
    return "\n".join(lines)


def run(body: str) -> np.ndarray:
    """Return (threads, 8) words."""
    out = torch.zeros(THREADS, 8, dtype=torch.int32)
    ptx.execute(module(body), (1,), [out], shared_bytes=0)
    return out.numpy()


def sizes(body: str) -> list[int]:
    """Return how many instructions each pack of the first run has."""
    steps = [step for step, *_ in decode(parse(module(body))).runs[0].lines]
    return [step.count for step in steps if isinstance(step, packs.Pack)]


def of_each(text: str, count: int = 8) -> str:
    return "\n".join(text.format(i=i, next=i + 10) for i in range(count))


TID = np.arange(THREADS)[:, None]
PLACE = np.arange(8)[None, :]
VALUES = {
    "constants": (of_each("add.s32 %r{i}, %r90, {next};"), TID + PLACE + 10),
    "one for all threads": (
        of_each("mov.b32 %r{next}, {i};") + of_each("add.s32 %r{i}, %r{next}, 5;"),
        TID * 0 + PLACE + 5,
    ),
    "one for all threads beside one for each": (
        "mov.b32 %r80, 1;\n"
        + "\n".join(f"mul.lo.s32 %r{i + 10}, %r{90 if i == 3 else 80}, {i};" for i in range(8))
        + of_each("add.s32 %r{i}, %r{next}, 5;"),
        np.where(PLACE == 3, 3 * TID, PLACE) + 5,
    ),
    "one number everywhere": (
        "mov.b32 %r80, 7;" + of_each("add.s32 %r{i}, %r80, %r80;"), TID * 0 + PLACE * 0 + 14,
    ),
    "shuffles of lanes": (
        of_each("add.s32 %r{next}, %r90, {i};")
        + of_each("shfl.sync.bfly.b32 %r{i}, %r{next}, 1, 31, -1;"),
        (TID ^ 1) + PLACE,
    ),
    "shuffles of numbers that all lanes share": (
        of_each("mov.b32 %r{next}, {i};", 32)
        + "\n".join(f"shfl.sync.bfly.b32 %r{50 + i}, %r{10 + i}, 1, 31, -1;" for i in range(32))
        + "\n".join(f"mov.b32 %r{i}, %r{50 + i};" for i in range(8)),
        TID * 0 + PLACE,
    ),
    "halves of words": (
        ".reg .b16 %h<20>;" + of_each("add.s32 %r{next}, %r90, 65536;")
        + "\n".join(f"mov.b32 {{%h{i}, %h{10 + i}}}, %r{10 + i};" for i in range(8))
        + "\n".join(f"mov.b32 %r{i}, {{%h{10 + i}, %h{i}}};" for i in range(8)),
        (TID << 16) + 1 + PLACE * 0,
    ),
    "a register that is read before it is written again": (
        of_each("mov.b32 %r{i}, %r90;") + of_each("add.s32 %r{next}, %r{i}, 1;")
        + "add.s32 %r0, %r1, 100;" + of_each("add.s32 %r{i}, %r{next}, %r0;"),
        # Each is computed from %r0 as it is by then.
        np.where(PLACE == 0, 2 * TID + 101, 3 * TID + 102),
    ),
    "where threads disagree": (
        of_each("mov.b32 %r{i}, {next};")
        + "setp.lt.u32 %p0, %r90, 40;\n@%p0 bra $ON;\n" + of_each("add.s32 %r{i}, %r{i}, %r90;")
        + "bra.uni $END;\n$ON:\n" + of_each("sub.s32 %r{i}, %r{i}, %r90;") + "\n$END:\n",
        np.where(TID < 40, PLACE + 10 - TID, PLACE + 10 + TID),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("at_once", [1 << 20, 3 * THREADS])
def test_values(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole packs, and packs that are cut since they would leave the caches."""
    monkeypatch.setattr(packs, "THREADS_AT_ONCE", at_once)
    body, wanted = VALUES[name]
    np.testing.assert_array_equal(run(body), wanted)


def test_packs_hold_what_is_alike() -> None:
    assert sizes(VALUES["constants"][0]) == [8]
    assert sizes(VALUES["shuffles of numbers that all lanes share"][0]) == [32]
    assert sizes(of_each("shl.b32 %r{i}, %r90, {i};")) == [], "each constant is a function"
    chain = "\n".join(f"add.s32 %r{b}, %r{a}, 1;" for a, b in pairwise(range(8)))
    assert sizes(chain) == [], "each needs the one before"


def places(*instructions: tuple[Any, Any, bool]) -> list[int]:
    reads, writes, ordered = zip(*instructions, strict=True)
    found = packs.levels(range(len(instructions)), reads, writes, lambda i: ordered[i])
    return list(found.values())


def test_levels() -> None:
    assert places(((1,), (2,), False), ((3,), (4,), False)) == [0, 0]
    assert places(((1,), (2,), False), ((2,), (3,), False)) == [0, 1], "a value that is needed"
    assert places(((1,), (2,), False), ((3,), (1,), False)) == [0, 1], "a value still to be read"
    assert places(((1,), (2,), False), ((3,), (2,), False)) == [0, 1], "the later one stays"
    # A store waits for its value, and what follows it for the store: on the same level, in order.
    waits = ((1,), (2,), False), ((2,), (), True), ((5,), (6,), True), ((7,), (8,), False)
    assert places(*waits) == [0, 1, 1, 0]
