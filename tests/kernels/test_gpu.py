"""Properties that only a GPU can show, of all kernels: no synchronisation, graphs, huge tensors.

The hundred repeats bit for bit are in `tests/kernels/test_ops.py`.

Written where no GPU is; the bodies that can run on a CPU are rehearsed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers.huge_parts import PARTS
from helpers.lanes import Way
from helpers.ops import (
    as_leaves,
    gradients,
    in_fp64,
    inputs_of,
    map_tensors,
    op_cases,
    results,
    skip_unless_covered,
    upstream_of,
)
from helpers.synchronisation import synchronisation_is_an_error
from torch import Tensor

from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, Inputs, OpSpec, case
from stlm_kernels.testing import assert_matches

ON_GPU = pytest.mark.lanes("gpu")
SAMPLED_ROWS = 1000


def skip_unless_kernel(spec: OpSpec, way: Way) -> None:
    skip_unless_covered(spec, way)
    if way.impl != "triton":
        pytest.skip("about the kernels")


@ON_GPU
@pytest.mark.parametrize(("spec", "case"), op_cases("smoke", "gpu"))
def test_no_synchronisation(spec: OpSpec, case: Case, way: Way) -> None:
    skip_unless_kernel(spec, way)
    if case.get("max_patches", 0) is None:
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


def spread_over(rows: int, count: int = SAMPLED_ROWS) -> Tensor:
    """The first row, the last, and others between them; fp32 counts to 2^24 only."""
    return torch.linspace(0, max(rows - 1, 0), count, dtype=torch.float64).long()


def test_sampled_rows_of_a_huge_tensor_are_in_it() -> None:
    for rows in (1, 999, 17_000_000, 2**31 + 1):
        found = spread_over(rows)
        assert (found[0], found[-1]) == (0, rows - 1)
        assert bool((found.diff() >= 0).all())


def flat(x: Tensor) -> Tensor:
    """Leading dimensions as one, as in a `Part`: those before the last, or before (H, K)."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def summed_by_row(rows: Tensor, *grads: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Sum parts of a row's gradient: two sampled rows may look at the same one."""
    unique, own = rows.unique(return_inverse=True)
    return unique, [x.new_zeros(len(unique), *x.shape[1:]).index_add(0, own, x) for x in grads]


def assert_sampled_rows_match(
    spec: OpSpec, case: Case, way: Way, sampled: int = SAMPLED_ROWS
) -> int:
    """Rows of the results, the last among them, and the gradients of these rows alone.

    The reference sees nothing but the part of the inputs that decides them.

    Returns:
        Elements of the largest tensor.
    """
    inputs = inputs_of(spec, case, way)
    outputs = {name: flat(x) for name, x in results(spec.op(**inputs, impl=way.impl)).items()}
    count = next(iter(outputs.values())).shape[0]
    if spec.name == "patch_attention":
        sampled = max(1, sampled // 12)  # a byte comes with its patch
    part = PARTS[spec.name](inputs, spread_over(count, sampled).unique())
    assert part.out_rows[-1] == count - 1
    small = map_tensors(part.inputs, lambda x: x.detach().cpu())
    wide = in_fp64(part.spec, small)
    narrow = as_leaves(part.spec, small)
    want = results(part.spec.reference(**wide))
    allowed = results(part.spec.yardstick(**narrow))
    ups = upstream_of({name: x[part.own_rows] for name, x in allowed.items()})
    for (name, x), y, z in zip(outputs.items(), want.values(), allowed.values(), strict=True):
        got = x.detach()[part.out_rows.to(x.device)]
        if not x.is_floating_point():
            assert torch.equal(got.cpu(), y[part.own_rows]), f"{name} differs"
            continue
        assert_matches(got, y[part.own_rows], z[part.own_rows], name=name)
    tensors = [x for x in (*inputs.values(), *outputs.values()) if isinstance(x, Tensor)]
    largest = max(x.numel() for x in tensors)
    if not spec.grad_args:
        return largest

    def grads_of(given: Inputs, outs: Iterable[Tensor], rows: Tensor, names: list[str]) -> Any:
        heads = list(outs)
        full = [torch.zeros_like(x) for x in heads]
        for x, up in zip(full, ups.values(), strict=True):
            x[rows.to(x.device)] = up.to(x)
        return torch.autograd.grad(heads, [given[name] for name in names], full)

    own_names = [own for own, _ in part.arguments.values()]
    whole = grads_of(inputs, outputs.values(), part.out_rows, list(part.arguments))
    exact = grads_of(wide, want.values(), part.own_rows, own_names)
    yard = grads_of(narrow, allowed.values(), part.own_rows, own_names)
    for got, y, z, (name, (_, rows)) in zip(
        whole, exact, yard, part.arguments.items(), strict=True
    ):
        if rows is not None:
            rows, (y, z) = summed_by_row(rows, y, z)
            got = flat(got)[rows.to(got.device)]
        table = name in spec.row_args
        assert_matches(got, y, z, name=f"gradient of {name}", rows=table)
    return largest


@ON_GPU
@pytest.mark.exclusive
@pytest.mark.parametrize(("spec", "case"), op_cases("huge"))
def test_more_than_2_to_31_elements(spec: OpSpec, case: Case) -> None:
    way = Way("triton", "cuda", torch.bfloat16)
    assert assert_sampled_rows_match(spec, case, way) > 2**31


REHEARSED = {
    "byte_pool": case(T=300, P=60, V=256, D=20, mode="mean", boundaries="even"),
    "segment_pool": case(T=300, P=60, D=20, mode="mean", boundaries="even"),
    "attention_pool": case(T=200, P=33, H=4, KV=4, K=16, query="own", boundaries="even"),
    "ngram_embedding": case(
        T=300, D=20, tables=((2, 512),), S=4, boundaries="even", text="english"
    ),
    "unpool": case(T=300, P=60, D=20, S=4, boundaries="even", plus="residual"),
    "ema_unpool": case(T=300, P=60, D=20, S=4, boundaries="even", gates="router", plus="residual"),
    "linear_sample": case(N=130, D=32, V=256, t=0.0),
    "linear_logprobs": case(N=130, D=32, V=256),
    "attention": case(B=2, T=150, H=4, KV=4, K=16, W=20),
    "patch_attention": case(T=200, P=20, H=4, KV=4, K=16, boundaries="even"),
    "qk_norm_rope": case(T=120, H=2, KV=1, K=16, norm="qk", positions="packed"),
    "qkv_rope": case(T=120, D=32, H=4, KV=1, K=16, norm="qk", positions="packed"),
    "swiglu": case(T=120, D=32, F=24, norm="none"),
    "decode_attention": case(B=3, C=64, H=4, KV=2, K=16, lens="full", window=20),
}
"""The huge cases' options at sizes for a CPU."""


@pytest.mark.lanes("cpu", "interpret")
@pytest.mark.parametrize("name", REHEARSED)
def test_rehearsal_of_the_sampled_rows(name: str, way: Way, full: bool) -> None:
    if way.impl == "triton" and not full:
        pytest.skip("the interpreter takes a minute: with --full")
    assert_sampled_rows_match(OPS[name], REHEARSED[name], way, sampled=24)


def test_every_huge_case_is_rehearsed_with_its_options() -> None:
    for name, spec in OPS.items():
        for huge in spec.tagged("huge"):
            rehearsed, named = (
                {k: v for k, v in x.sizes.items() if isinstance(v, str)}
                for x in (REHEARSED[name], huge)
            )
            assert (rehearsed, REHEARSED[name].sizes.keys()) == (named, huge.sizes.keys()), name


@pytest.mark.lanes("cpu", "gpu")
def test_every_op_with_kernels_has_a_huge_case() -> None:
    # One launches another's kernels; offsets of 32 bits count the other's bytes.
    without = {"linear_cross_entropy", "find_patches"}
    for name, spec in OPS.items():
        assert bool(spec.tagged("huge")) is (bool(spec.kernels) and name not in without), name
