"""What only a GPU can show, for every op with kernels: no synchronisation, graphs, huge tensors.

The hundred repeats bit for bit are in `tests/test_ops.py`.

Written where no GPU is; the bodies that can run on a CPU are rehearsed there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Way
from op_helpers import (
    gradients,
    inputs_of,
    op_cases,
    results,
    skip_unless_covered,
    upstream_of,
)
from torch import Tensor

from stlm_kernels._spec import Case, OpSpec
from stlm_kernels.registry import OPS

ON_GPU = pytest.mark.lanes("gpu")
SAMPLED_ROWS = 1000


def skip_unless_kernel(spec: OpSpec, way: Way) -> None:
    skip_unless_covered(spec, way)
    if way.impl != "triton":
        pytest.skip("about the kernels")


@contextmanager
def synchronisation_is_an_error() -> Any:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke", "gpu"))
def test_no_synchronisation(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_kernel(spec, way)
    if case.get("capacity", 0) is None:
        pytest.skip("an exact size costs one synchronisation, by contract")
    inputs = inputs_of(spec, case, way)
    outputs = results(spec.op(**inputs, impl="triton"))  # compiles as well
    upstream = upstream_of(outputs)
    gradients(spec, inputs, outputs, upstream)
    with synchronisation_is_an_error():
        outputs = results(spec.op(**inputs, impl="triton"))
        gradients(spec, inputs, outputs, upstream)


@ON_GPU
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke", "gpu"))
def test_graph_replay_with_changed_contents(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_kernel(spec, way)
    static, other = inputs_of(spec, case, way), inputs_of(spec, case, way, seed=7)
    frozen = {k: v.detach() if isinstance(v, Tensor) else v for k, v in static.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        spec.op(**frozen, impl="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = spec.op(**frozen, impl="triton")
    for name, x in frozen.items():
        if isinstance(x, Tensor):
            x.copy_(other[name].detach())
    graph.replay()
    torch.cuda.synchronize()
    fresh = spec.op(**other, impl="triton")
    both = [(captured, fresh)] if isinstance(fresh, Tensor) else zip(captured, fresh, strict=True)
    for a, b in both:
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0, equal_nan=True)


def spread_over(rows: int) -> Tensor:
    """The first row, the last, and others between them; fp32 counts to 2^24 only."""
    return torch.linspace(0, max(rows - 1, 0), SAMPLED_ROWS, dtype=torch.float64).long()


def test_sampled_rows_of_a_huge_tensor_are_in_it() -> None:
    for rows in (1, 999, 17_000_000, 2**31 + 1):
        found = spread_over(rows)
        assert (found[0], found[-1]) == (0, rows - 1)
        assert bool((found.diff() >= 0).all())


def last_rows_match(spec: OpSpec, inputs: dict[str, Any], impl: str) -> None:
    """Sampled elements of the result, the last row among them, against the torch path's."""
    with torch.no_grad():
        got = spec.op(**inputs, impl=impl)
        want = spec.op(**inputs, impl="torch")
    pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
    for a, b in pairs:
        a, b = torch.atleast_1d(a, b)
        rows = spread_over(a.shape[0]).to(a.device)
        wide_a, wide_b = a[rows].double(), b[rows].double()
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        torch.testing.assert_close(wide_a, wide_b, rtol=4 * eps, atol=16 * eps, equal_nan=True)


@ON_GPU
@pytest.mark.alone
@pytest.mark.parametrize(("spec", "case"), op_cases("huge"))
def test_more_than_2_to_31_elements(spec: OpSpec, case: Case) -> None:
    if not spec.kernels:
        pytest.skip("this op has no kernel yet")
    inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cuda"), 0)
    last_rows_match(spec, inputs, "triton")


@pytest.mark.lanes("cpu", "gpu")
def test_every_op_with_kernels_has_a_huge_case() -> None:
    small = {"linear_cross_entropy", "linear_sample", "patch_attention", "find_patches"}
    for name, spec in OPS.items():
        if spec.kernels and name not in small:
            assert spec.tagged("huge"), name
