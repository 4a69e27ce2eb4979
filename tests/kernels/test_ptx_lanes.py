"""Lanes of a warp together, instruction by instruction, by brute force."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch

from stlm_kernels import ptx
from stlm_kernels.ptx import Fault, PtxError

pytestmark = pytest.mark.lanes("compiled")
EVERY = "0xffffffff"
WORDS = np.random.default_rng(0).integers(0, 1 << 32, (4, 32), dtype=np.uint64).astype(np.uint32)
WORDS[1] = 7
WORDS[2, 5] = 0
WORDS[3] = 0


def executed(lines: str, words: np.ndarray = WORDS) -> np.ndarray:
    """`%d` of each lane (warps, 32) from its word `%a`."""
    text = f""".visible .entry one(.param .u64 x, .param .u64 out) .reqntid {words.size} {{
    .reg .b32 %t, %a, %d, %e, %m; .reg .b64 %x, %o, %at; .reg .pred %p, %q, %half;
    ld.param.u64 %x, [x]; ld.param.u64 %o, [out]; mov.u32 %t, %tid.x; mov.u32 %m, -1;
    mul.wide.u32 %at, %t, 4; add.s64 %x, %x, %at; add.s64 %o, %o, %at;
    ld.global.b32 %a, [%x]; setp.ne.u32 %p, %a, 0; mov.u32 %d, 77;
    {lines}
    st.global.b32 [%o], %d; ret; }}"""
    x = torch.from_numpy(words.copy().view(np.int32))
    out = torch.zeros_like(x)
    ptx.execute(text, (1,), (x, out), shared_bytes=0)
    return out.numpy().view(np.uint32)


REDUCTIONS: dict[str, Any] = {
    "add.s32": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "min.s32": min,
    "max.s32": max,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    got = executed(f"redux.sync.{name} %d, %a, {EVERY};")
    numbers = WORDS.view(np.int32) if name.endswith("s32") else WORDS
    for row, values in zip(got, numbers.tolist(), strict=True):
        assert set(row.tolist()) == {reduce(REDUCTIONS[name], values) % (1 << 32)}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("keeps_nan", [False, True])
@pytest.mark.parametrize("name", ["min", "max"])
def test_reductions_of_floats(name: str, keeps_nan: bool, absolute: bool) -> None:
    values = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    values[1, 7], values[2], values[3, 3] = np.nan, -np.inf, np.nan
    values[3, 4] = 100
    opcode = f"redux.sync.{name}{'.abs' * absolute}{'.NaN' * keeps_nan}.f32"
    got = executed(f"{opcode} %d, %a, {EVERY};", values.view(np.uint32)).view(np.float32)
    values = np.abs(values) if absolute else values
    function = {"min": (np.nanmin, np.min), "max": (np.nanmax, np.max)}[name][keeps_nan]
    np.testing.assert_array_equal(got, np.repeat(function(values, 1, keepdims=True), 32, 1))


def test_votes() -> None:
    on = WORDS != 0
    ballot = executed(f"vote.sync.ballot.b32 %d, %p, {EVERY};")
    want = [sum(int(x) << i for i, x in enumerate(row)) for row in on]
    assert ballot.tolist() == [[x] * 32 for x in want]
    for mode, value in {
        "any": on.any(1), "all": on.all(1), "uni": on.all(1) | ~on.any(1),
    }.items():  # fmt: skip
        got = executed(f"vote.sync.{mode}.pred %q, %p, {EVERY}; selp.u32 %d, 1, 0, %q;")
        assert got.tolist() == [[int(x)] * 32 for x in value], mode


def test_one_lane_of_each_warp_is_elected() -> None:
    got = executed(f"elect.sync %e|%q, {EVERY}; selp.u32 %d, 1, 0, %q; mad.lo.u32 %d, %e, 16, %d;")
    assert got.tolist() == [[1] + [0] * 31] * 4
    assert executed(f"elect.sync _|%q, {EVERY}; selp.u32 %d, 1, 0, %q;").tolist() == got.tolist()


def test_active_lanes_are_seen() -> None:
    got = executed("activemask.b32 %d;")
    assert (got == 0xFFFFFFFF).all()
    got = executed("@!%p bra $SKIP; activemask.b32 %d; $SKIP:")
    on = WORDS != 0
    masks = [sum(int(x) << i for i, x in enumerate(row)) for row in on]
    want = [[m if x else 77 for x in row] for m, row in zip(masks, on, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize(
    "line",
    [
        "redux.sync.add.s32 %d, %a, {};",
        "vote.sync.ballot.b32 %d, %p, {};",
        "elect.sync %d|%q, {};",
        "shfl.sync.bfly.b32 %d, %a, 1, 31, {};",
        "bar.warp.sync {};",
    ],
)
def test_masks_of_some_lanes_are_refused(line: str) -> None:
    """A warp of which some lanes are away is a fault: whether these come along is not followed."""
    executed(line.format("%m"))
    with pytest.raises(PtxError, match=r"of some lanes is not known here \(no source line, PTX"):
        executed(line.format("0xffff"))
    half = "and.b32 %e, %t, 16; setp.eq.u32 %half, %e, 0; @%half bra $SKIP; {} $SKIP:"
    with pytest.raises(Fault, match=r"barrier: one.*all 32 lanes"):
        executed(half.format(line.format(EVERY)))
