"""Bounds of what an execution keeps in memory."""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from stlm_kernels import ptx
from stlm_kernels.ptx import launch, reports
from stlm_kernels.ptx.decode import decode
from stlm_kernels.ptx.parse import parse
from stlm_kernels.ptx.state import state_bytes
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case

pytestmark = pytest.mark.lanes("compiled")
SHARED, BLOCKS, MIB = 100_000, 64, 1 << 20

BYTES_IN_SHARED_MEMORY = """.extern .shared .align 16 .b8 memory[];
.visible .entry bytes() .reqntid 32 { .reg .b32 %t, %at; .reg .b16 %x;
mov.u32 %t, %tid.x; mov.u32 %at, memory; add.u32 %at, %at, %t; mov.u16 %x, 1;
st.shared.b8 [%at], %x; bar.sync 0; ld.shared.b8 %x, [%at]; st.shared.b8 [%at], %x; ret; }"""


def many_registers(count: int) -> str:
    """A kernel all of whose registers differ by thread."""
    lines = "".join(f"add.u32 %r{i}, %r{i - 1}, %r0;\n" for i in range(1, count))
    return f""".visible .entry wide() .reqntid 128 {{ .reg .b32 %r<{count}>;
    mov.u32 %r0, %tid.x;\n{lines} ret; }}"""


@pytest.mark.parametrize(
    ("text", "shared"),
    [(BYTES_IN_SHARED_MEMORY, SHARED), (many_registers(2000), 0)],
    ids=["shared", "registers"],
)
def test_a_batch_stays_within_its_bytes(
    monkeypatch: pytest.MonkeyPatch, text: str, shared: int
) -> None:
    limit = 16 * MIB
    monkeypatch.setattr(launch, "STATE_BYTES", limit)
    ptx.execute(text, (1,), (), shared_bytes=shared)  # decodes
    tracemalloc.start()
    try:
        ptx.execute(text, (BLOCKS,), (), shared_bytes=shared)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = BLOCKS * state_bytes(decode(parse(text)), shared)
    assert whole > 2 * limit, "all blocks at once would be beyond it"
    assert peak < 1.25 * limit


def test_a_block_larger_than_the_limit_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STATE_BYTES", 1)
    code = decode(parse(BYTES_IN_SHARED_MEMORY))
    assert launch.blocks_at_once(code, SHARED) == 1
    ptx.execute(BYTES_IN_SHARED_MEMORY, (3,), (), shared_bytes=SHARED)


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_large_gradients_of_sampled_blocks_take_no_memory() -> None:
    x = torch.empty(1 << 19, 512, dtype=torch.bfloat16)
    before = resident()
    upstream = reports.upstream_of(x, 12)
    assert upstream.shape == x.shape
    assert upstream.dtype == x.dtype
    assert upstream.data_ptr() % 512 == 0
    assert resident() - before < x.nbytes // 8
    assert not torch.count_nonzero(upstream[::4096])
    assert torch.equal(reports.upstream_of(x[:2], 12), torch.ones_like(x[:2]))


def test_large_inputs_of_sampled_blocks_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual of this case is the largest input of all: 24 MiB, beside 4 of the states."""
    monkeypatch.setattr(reports, "LARGEST_INPUT", 8 * MIB)
    spec, inputs = OPS["unpool"], {}
    sizes = {"T": 1 << 16, "P": 10_923, "D": 192, "S": 1, "boundaries": "even", "plus": "residual"}

    def kept(**given: Any) -> torch.Tensor:
        inputs.update(given)
        return given["residual"]

    for sample in (12, None):
        reports.execute_case(
            spec, Case(sizes), arch=90, dtype=torch.bfloat16, direction="fwd", sample=sample,
            function=kept,
        )  # fmt: skip
        assert inputs["residual"].shape == (1 << 16, 192)
        assert bool(inputs["residual"].any()) == (sample is None)
        assert inputs["patch_states"].any()
