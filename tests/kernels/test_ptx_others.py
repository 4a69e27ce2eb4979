"""Kernels of other people: launched as their own code does it, executed here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ptx_kernels

from stlm_kernels import ptx

pytestmark = pytest.mark.lanes("compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outer_products_of_torch(dtype: torch.dtype) -> None:
    """Its launcher writes `kernel[grid](...)`."""
    ours = pytest.importorskip("torch._native.ops.bmm_outer_product.triton_kernels")
    a, b = torch.randn(3, 40, 1, dtype=dtype), torch.randn(3, 1, 70, dtype=dtype)
    with ptx.executing(arch=90) as session:
        out = ours.bmm_outer_product(a, b)
        session.assert_written(out)
    torch.testing.assert_close(out, a @ b)
    assert [done.kernel for done in session.executions] == ["_bmm_outer_product_kernel"]


def test_a_kernel_of_triton_itself() -> None:
    """Proton's: 64-bit scalars, a loop and barriers; it appends an id and values to a ring."""
    metric = pytest.importorskip("triton.profiler.metric")
    ring, at = torch.zeros(1024, dtype=torch.uint64), torch.tensor([5], dtype=torch.uint64)
    values = torch.arange(1, 301).to(torch.uint64)
    with ptx.executing(arch=80):
        metric.tensor_metric_kernel[(1,)](ring, at, 1024, 77, values, 300)
    assert int(ring[5]) == 77
    assert torch.equal(ring[6:306], values)
    assert int(at) == 306
    assert int(ring.long().count_nonzero()) == 301


@pytest.mark.parametrize("vocab", [1000, 257])
def test_cross_entropy_of_liger(vocab: int) -> None:
    """Loss and gradient by Liger's own autograd function; nothing of it knows of this executor."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits = torch.randn(24, vocab, requires_grad=True)
    labels = torch.randint(0, vocab, (24,))
    labels[3] = -100
    wanted = F.cross_entropy(logits, labels)
    (expected,) = torch.autograd.grad(wanted, logits)
    with ptx.executing(arch=90) as session:
        # It writes the gradient over the logits.
        loss = LigerCrossEntropyFunction.apply(
            logits.detach().clone().requires_grad_(), labels, None
        )[0]
    torch.testing.assert_close(loss, wanted.detach())
    done = session.executions[0]
    assert done.kernel == "liger_cross_entropy_kernel"
    torch.testing.assert_close(done.arguments[0].view_as(expected), expected)


def test_grids_that_are_functions_and_autotuned_kernels() -> None:
    import triton

    x, out = torch.randn(700), torch.empty(700)
    grid: Any = lambda meta: (triton.cdiv(700, meta["BLOCK"]),)  # noqa: E731
    with ptx.executing(arch=90) as session:
        ptx_kernels.add_rows[grid](x, x, out, 700, BLOCK=128, num_warps=2)
        assert torch.equal(out, 2 * x)
        out.zero_()
        configs = [triton.Config({"BLOCK": size}, num_warps=1) for size in (64, 256)]
        tuned = triton.autotune(configs, key=["n"])(ptx_kernels.add_rows)
        tuned[grid](x, x, out, 700)
        assert torch.equal(out, 2 * x)
    assert [done.grid for done in session.executions] == [(6, 1, 1), (11, 1, 1)]
