"""unpool beyond what every op owes: runs, NaN, precision, bad ids, transforms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints, leaf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels import explain, unpool
from stlm_kernels.ops.unpool.op import check_read_id_values
from stlm_kernels.ops.unpool.reference import reference

NAN = math.nan
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


# ---- by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_rows_of_patches_null_state_and_residual(dtype: torch.dtype) -> None:
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    reads = torch.tensor([-1, 0, 0, -1, 2], dtype=dtype)
    assert unpool(states, reads).tolist() == [[0, 0], [1, 2], [1, 2], [0, 0], [5, 6]]
    null = torch.tensor([7.0, 8.0])
    got = unpool(states, reads, null_state=null, residual=torch.full((5, 2), 0.5))
    assert got.tolist() == [[7.5, 8.5], [1.5, 2.5], [1.5, 2.5], [7.5, 8.5], [5.5, 6.5]]


def test_ids_of_one_byte() -> None:
    states = torch.randn(256, 1)
    reads = torch.tensor([0, 254, 255], dtype=torch.uint8)
    assert torch.equal(unpool(states, reads), states[[0, 254, 255]])


def test_runs_may_come_in_any_order() -> None:
    states, reads = leaf(4, 2), ints(2, 2, -1, 0, 0, 0, -1, 3)
    out = unpool(states, reads)
    upstream = torch.randn(8, 2)
    (gradient,) = torch.autograd.grad(out, states, upstream)
    want = [upstream[3:6].sum(0), torch.zeros(2), upstream[:2].sum(0), upstream[7]]
    torch.testing.assert_close(gradient, torch.stack(want))


def test_the_residual_is_left_alone() -> None:
    states, residual = torch.randn(2, 3), torch.randn(4, 3)
    before = residual.clone()
    out = unpool(states, ints(-1, 0, 0, 1), residual=residual)
    assert torch.equal(residual, before)
    assert out.data_ptr() != residual.data_ptr()


# ---- precision, NaN ---------------------------------------------------------------------------


@EVERY_LANE
@pytest.mark.parametrize("ids", [(-1, 0, 0, 1, 1, 2, -1), (-1, 2, 1, 1, 0, 0, -1)])
def test_nan_reaches_no_patch_but_its_own(way: Way, ids: tuple[int, ...]) -> None:
    states, null = (leaf(*s, dtype=way.dtype, device=way.device) for s in ((3, 2), (2,)))
    reads = ints(*ids).to(way.device)
    upstream = torch.ones(7, 2, dtype=way.dtype, device=way.device)
    ones = upstream.clone()
    upstream[reads == 1] = NAN
    out = unpool(states, reads, null_state=null, impl=way.impl)
    gradient, null_gradient = torch.autograd.grad(out, [states, null], upstream)
    assert gradient[:, 0].nan_to_num(nan=-1).tolist() == [2, -1, 1]
    assert null_gradient.tolist() == [2, 2]
    with torch.no_grad():
        states[1] = NAN
    out = unpool(states, reads, null_state=null, residual=ones, impl=way.impl)
    assert torch.equal(out.isnan(), (reads == 1)[:, None].expand(7, 2))


@EVERY_LANE
@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_accumulate_wide(way: Way, recorded: bool) -> None:
    if recorded and way.impl == "triton":
        pytest.skip("a kernel's gradient is not differentiated")
    states, null = (leaf(*s, dtype=way.dtype, device=way.device) for s in ((2, 1), (1,)))
    rows = 65 if way.impl == "triton" and way.device == "cpu" else 1000
    reads = torch.cat([ints(-1).expand(rows), ints(1).expand(rows)]).to(way.device)
    out = unpool(states, reads, null_state=null, impl=way.impl)
    upstream = torch.full_like(out, 0.25)
    upstream[[0, rows]] = 2.0**14  # in a 16-bit sum, quarters beside it would vanish
    grads = torch.autograd.grad(
        out, [states, null], upstream.requires_grad_(recorded), create_graph=recorded
    )
    want = torch.tensor(2.0**14 + (rows - 1) / 4, dtype=way.dtype).item()
    assert grads[0].flatten().tolist() == [0, want]
    assert grads[1].tolist() == [want]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_null_state_beside_16_bit_patches(dtype: torch.dtype) -> None:
    states, null, residual = leaf(2, 3, dtype=dtype), leaf(3), leaf(2049, 3, dtype=dtype)
    reads = torch.cat([ints(-1).expand(2047), ints(0, 1)])
    out = unpool(states, reads, null_state=null, residual=residual)
    assert out.dtype == dtype
    assert torch.equal(out[0], null.to(dtype) + residual[0])
    grads = torch.autograd.grad(out, [states, null, residual], torch.ones_like(out))
    assert [g.dtype for g in grads] == [dtype, torch.float32, dtype]
    assert grads[1].tolist() == [2047.0] * 3  # bfloat16 and float16 would make 2048 of it


def test_autocast_rounds_when_loading_and_keeps_gradients_wide() -> None:
    states, null, residual = leaf(2, 3), leaf(3), leaf(2049, 3, dtype=torch.bfloat16)
    reads = torch.cat([ints(0).expand(2047), ints(1, -1)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unpool(states, reads, null_state=null, residual=residual)
        with_wide_residual = unpool(states, reads, null_state=null, residual=residual.float())
    rounded = unpool(states.bfloat16(), reads, null_state=null.bfloat16(), residual=residual)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rounded)
    assert torch.equal(out, with_wide_residual)
    grads = torch.autograd.grad(out, [states, null, residual], torch.ones_like(out))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16]
    assert grads[0][:, 0].tolist() == [2047.0, 1.0]


# ---- against the reference -----------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Runs in any order with unread patches, and rows that read nothing between them."""
    patches, width = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    reads: list[int] = []
    for patch in draw(st.permutations(range(patches))):
        reads += [-1] * draw(st.integers(0, 2)) + [patch] * draw(st.integers(0, 4))
    reads += [-1] * draw(st.integers(0, 2))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def whole(*shape: int) -> Tensor:  # so that every sum is exact in every dtype
        return torch.randint(-4, 5, shape, generator=rng).double()

    return {
        "patch_states": whole(patches, width),
        "read_ids": ints(*reads),
        "null_state": whole(width) if draw(st.booleans()) else None,
        "residual": whole(len(reads), width) if draw(st.booleans()) else None,
    }


def as_leaves(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in call.items()
    }


def grads_of(out: Tensor, call: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    leaves = [x for x in call.values() if x is not None and x.requires_grad]
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype), materialize_grads=True,
                                allow_unused=True)  # fmt: skip
    return list(grads)


@given(calls(), st.sampled_from(FLOATS))
def test_equals_the_reference(call: dict[str, Any], dtype: torch.dtype) -> None:
    ours, wide = as_leaves(call, dtype), as_leaves(call, torch.float64)
    out, want = unpool(**ours), reference(**wide)
    assert out.tolist() == want.tolist()
    if not want.requires_grad:
        return
    upstream = torch.arange(out.numel()).view(out.shape) % 7 - 3.0
    for got, wanted in zip(
        grads_of(out, ours, upstream), grads_of(want, wide, upstream), strict=True
    ):
        assert got.tolist() == wanted.tolist()


# ---- derivatives, transforms, unchecked values ------------------------------------------------


def test_derivatives() -> None:
    reads = ints(-1, 0, 0, -1, 2, 2, -1)
    leaves = [leaf(4, 2, dtype=torch.float64), leaf(2, dtype=torch.float64)]
    leaves.append(leaf(7, 2, dtype=torch.float64))

    def function(states: Tensor, null: Tensor, residual: Tensor) -> Tensor:
        return unpool(states, reads, null_state=null, residual=residual)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_torch_func(batched: tuple[int | None, ...]) -> None:
    reads = ints(-1, 0, 0, -1, 2)
    shapes = ((3, 2), (2,), (5, 2))
    given = [
        torch.randn(shape if axis is None else (4, *shape))
        for shape, axis in zip(shapes, batched, strict=True)
    ]

    def square(states: Tensor, null: Tensor, residual: Tensor) -> Tensor:
        return unpool(states, reads, null_state=null, residual=residual).square().sum()

    def by_hand(index: int) -> tuple[Tensor, ...]:
        leaves = [
            (x if axis is None else x[index]).clone().requires_grad_()
            for x, axis in zip(given, batched, strict=True)
        ]
        return torch.autograd.grad(square(*leaves), leaves)

    gradient = torch.func.grad(square, argnums=(0, 1, 2))
    got = torch.func.vmap(gradient, in_dims=batched)(*given)
    for grads, wanted in zip(got, zip(*map(by_hand, range(4)), strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(wanted))
    if batched == (0, 0, 0):
        jacobian = torch.func.jacrev(lambda s: unpool(s, reads))(given[0][0])
        assert jacobian.sum((0, 1)).tolist() == [[2, 2], [0, 0], [1, 1]]


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unchecked_ids_out_of_range_are_loud_and_in_bounds(way: Way, dtype: torch.dtype) -> None:
    far = 2**32 if dtype == torch.int64 else 2**31 - 1
    reads = torch.tensor([0, 3, -2, 1, far, -far, -1], dtype=dtype, device=way.device)
    bad = torch.tensor([False, True, True, False, True, True, False], device=way.device)
    leaves = tuple(torch.randn(s, device=way.device) for s in ((3, 2), (2,), (7, 2)))

    def total(states: Tensor, null: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out = unpool(states, reads, null_state=null, residual=residual, impl=way.impl)
        return out.sum(), out

    grads, out = torch.func.grad(total, argnums=(0, 1, 2), has_aux=True)(*leaves)
    assert torch.equal(out.isnan(), bad[:, None].expand(7, 2))
    assert grads[0].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert grads[1].tolist() == [1, 1]
    assert grads[2].tolist() == [[1, 1]] * 7


def test_compiles_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unpool, fullgraph=True, backend=counter, dynamic=True)
    for total in (40, 33, 57):
        leaves = [leaf(9, 5), leaf(5), leaf(total, 5)]
        reads = (torch.arange(total) // 7 - 1).int()
        out = compiled(leaves[0], reads, null_state=leaves[1], residual=leaves[2])
        want = unpool(leaves[0], reads, null_state=leaves[1], residual=leaves[2])
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# ---- arguments --------------------------------------------------------------------------------

STATES, READS = torch.zeros(3, 2), ints(-1, 0, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_states": STATES.int()}, "patch_states: expected dtype float32 or"),
        ({"patch_states": STATES[0]}, r"patch_states: expected shape \(P, D\), got \(2,\)"),
        ({"patch_states": STATES[:, :0]}, r"patch_states: expected D >= 1, got \(3, 0\)"),
        ({"read_ids": READS.float()}, "read_ids: expected dtype uint8 or int16 or int32 or int64"),
        ({"read_ids": READS[None]}, r"read_ids: expected shape \(T,\), got \(1, 4\)"),
        ({"read_ids": READS.to("meta")}, "read_ids: expected device cpu, got meta"),
        ({"null_state": torch.zeros(3)}, r"null_state: expected shape \(2,\), got \(3,\)"),
        ({"null_state": torch.zeros(2).half()}, "null_state: expected dtype float32, got float16"),
        ({"residual": torch.zeros(3, 2)}, r"residual: expected shape \(4, 2\), got \(3, 2\)"),
        ({"residual": torch.zeros(4, 2).half()}, "residual: expected dtype float32, got float16"),
        ({"read_ids": ints(0, 1, 1, 0)}, "another run of 0 at position 3"),
        ({"read_ids": ints(1, -1, 1, 2)}, "one contiguous run for each id >= 0, got another run"),
        ({"read_ids": ints(2, 1, 0, 1)}, "another run of 1 at position 3"),
        ({"impl": "gpu"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpool(**{"patch_states": STATES, "read_ids": READS, **arguments})


def test_a_second_run_of_an_id_is_found_wherever_it_is() -> None:
    """Every sequence of six ids out of four is tried."""
    for ids in itertools.product(range(-1, 3), repeat=6):
        runs = [k for k, _ in itertools.groupby(ids) if k >= 0]
        if len(set(runs)) == len(runs):
            check_read_id_values(ints(*ids), 3)
        else:
            with pytest.raises(ValueError, match="got another run of"):
                check_read_id_values(ints(*ids), 3)


@pytest.mark.parametrize("bad", [-2, 3, 1000])
def test_ids_out_of_range(bad: int) -> None:
    message = rf"read_ids: expected values in \[-1, 2\], got {bad} at position 3"
    with pytest.raises(IndexError, match=message):
        unpool(STATES, ints(-1, 0, 1, bad))


def test_a_refusal_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"tensors are on cpu .*; .*float64"):
        unpool(STATES.double(), READS, impl="triton")
    assert any("on cpu" in reason for reason in explain(unpool, STATES, READS))
