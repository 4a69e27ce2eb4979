"""Products on sm_90 read shared memory asynchronously: waits and fences, planted one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ptx_launches import again, products, replaced, without

from stlm_kernels import ptx
from stlm_kernels.ptx import Execution, Fault
from stlm_kernels.ptx.faults import KINDS

pytestmark = pytest.mark.lanes("compiled")
FENCE = r"fence\.proxy\.async[^;]*;"
WAIT = r"cp\.async\.wait_group\s+\d+;\s+bar\.sync\s+0;"
"""Triton waits for the copies, and for all warps; what reads the tile follows."""
ALL = "fence.proxy.async.shared::cta;"
ONE = f"""{{ .reg .pred %one; .reg .b32 %which; mov.u32 %which, %tid.x;
setp.eq.u32 %one, %which, 77; @%one {ALL} }}"""


@pytest.fixture(name="kernels")
def kernels_of_the_tests() -> Any:
    from helpers import ptx_kernels

    return ptx_kernels


def faults(done: Execution, change: Callable[[str], str]) -> set[str]:
    """Kinds of the faults, and nothing raised."""
    return {fault.kind for fault in again(done, change, collect=KINDS).faults}


def fenced(text: str, before: str, between: str, after: str) -> str:
    """Fences around the barrier that follows a wait for copies, instead of the compiler's."""
    text = re.sub(FENCE, "", text) + "\n"  # triton 3.6 writes none
    return re.sub(
        r"(cp\.async\.wait_group\s+\d+;)(\s+bar\.sync\s+0;)",
        lambda found: before + found[1] + between + found[2] + after,
        text,
    )


def test_products_read_before_their_wait(kernels: Any) -> None:
    done, _, _ = products(kernels, 90)
    found = again(done, without(r"wgmma\.wait_group[^;]*;"), collect=KINDS).faults
    details = {fault.detail for fault in found if fault.kind == "async"}
    assert any("the product in its registers was not waited for" in x for x in details)
    assert any("a product that was not waited for reads it" in x for x in details)


def test_a_copy_into_what_a_product_still_reads(kernels: Any) -> None:
    """Wait for the group before last: the stage that it read may be filled again."""
    done, _, _ = products(kernels, 90)
    wait = r"wgmma\.wait_group\.sync\.aligned\s+1;"
    assert re.search(wait, done.ptx)
    assert "async" not in {fault.kind for fault in done.faults}
    assert "async" in faults(done, replaced(wait, "wgmma.wait_group.sync.aligned 2;", 9))


@pytest.mark.parametrize(
    ("before", "between", "after", "found"),
    [
        ("", "", "", {"proxy"}),
        (ALL, "", "", {"proxy"}),
        ("", ALL, "", set()),
        ("", "", ALL, set()),
        ("", ONE, "", {"proxy"}),
        ("", "", ONE, {"proxy"}),
        ("", "", f"{ONE} bar.sync 0;", set()),
        ("", "", "fence.proxy.async.global;", {"proxy"}),
        ("", "fence.acq_rel.cta;", "", {"proxy"}),
        ("", "fence.proxy.async;", "", set()),
    ],
    ids=[
        "none",
        "before the wait",
        "writers",
        "readers",
        "one writer",
        "one reader",
        "one thread between two barriers",
        "of global memory",
        "of another kind",
        "of all memory",
    ],
)
def test_fences_between_copies_and_products(
    kernels: Any, before: str, between: str, after: str, found: set[str]
) -> None:
    done, _, _ = products(kernels, 90)
    assert re.search(WAIT, done.ptx)
    assert faults(done, lambda text: fenced(text, before, between, after)) == found


def test_stores_that_a_product_reads_need_a_fence(kernels: Any) -> None:
    a = torch.randn(64, 128, dtype=torch.bfloat16)
    out = torch.empty(64, 64)
    done = ptx.run(
        kernels.multiply_sums, (1,), a, out, M=64, K=128, num_warps=4, arch=90
    )  # fmt: skip
    torch.testing.assert_close(out, (a + a).float() @ a.float().T, rtol=1e-5, atol=1e-3)
    assert re.search(r"st\.shared|stmatrix", done.ptx)
    with pytest.raises(Fault, match=r"proxy: multiply_sums.*without a fence.proxy.async since"):
        again(done, without(FENCE))


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("depth", [64, 128])
def test_canary_of_transposed_accumulators(depth: int, warps: int) -> None:
    """Triton 3.4 to 3.7.0 get its values wrong on a GPU: 3.6.0 writes right sums without fences."""
    import triton
    from helpers.canary import transposed_square, transposed_sums

    a, b = (torch.randn(64, depth, dtype=torch.bfloat16) for _ in range(2))
    c, out = torch.randn(64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    options: dict[str, Any] = {"arch": 90, "collect": KINDS, "num_warps": warps}
    want = (a.float() @ b.float().T).bfloat16().float().T @ c.float()
    done = ptx.run(transposed_sums, (1,), a, b, c, out, depth, N=64, BLOCK=32, **options)
    assert "wgmma" in done.ptx
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.5)
    lacks_fences = triton.__version__.startswith("3.6.")
    assert {fault.kind for fault in done.faults} == ({"proxy"} if lacks_fences else set())
    if depth == 64:
        done = ptx.run(transposed_square, (1,), a, b, c, out, N=64, **options)
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.5)
        assert not done.faults
