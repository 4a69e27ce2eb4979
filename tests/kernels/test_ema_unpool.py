"""ema_unpool beyond what every op owes: gates, documents, NaN, precision, transforms."""

from __future__ import annotations

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

from stlm_kernels import ema_unpool, explain, unpool
from stlm_kernels.ops.ema_unpool.reference import reference, yardstick
from stlm_kernels.ops.ema_unpool.torch_impl import CHUNK
from stlm_kernels.testing import assert_matches, poisoned_memory

NAN = math.nan
BOTH_IMPLEMENTATIONS = pytest.mark.lanes("cpu", "interpret", "gpu")


def gates(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)).to(dtype).requires_grad_()


# ---- by hand ----------------------------------------------------------------------------------


def test_smooths_within_documents_and_reads() -> None:
    states = torch.tensor([[8.0], [4.0], [2.0], [6.0], [1.0]])
    gate = torch.tensor([0.5, 0.25, 0.5, 0.5, 1.0])
    reads = ints(-1, 0, 1, 1, 2, 3, -1)
    assert ema_unpool(states, gate, reads)[:, 0].tolist() == [0, 4, 4, 4, 3, 4.5, 0]
    documents = ints(0, 2, 2, 4)  # the last patch is an unused slot
    out = ema_unpool(states, gate, reads, cu_seqlens=documents, residual=torch.ones(7, 1))
    assert out[:, 0].tolist() == [1, 5, 5, 5, 2, 4.5, 1]


def test_gates_of_one_are_unpool_and_gates_of_zero_hand_on() -> None:
    states, reads = torch.randn(40, 3), torch.arange(-1, 39).int()
    assert torch.equal(ema_unpool(states, torch.ones(40), reads), unpool(states, reads))
    gate = torch.zeros(40)
    gate[[3, 20]] = 1.0
    out = ema_unpool(states, gate, reads)
    assert not out[:4].any()
    assert torch.equal(out[4:21], states[3].expand(17, 3))
    assert torch.equal(out[21:], states[20].expand(19, 3))


def test_runs_may_come_in_any_order() -> None:
    states, gate, reads = leaf(4, 2), gates(4), ints(2, 2, -1, 0, 0, 0, -1, 3)
    order = torch.tensor([3, 4, 5, 0, 1, 7, 2, 6])  # sorted, then the rows that read nothing
    out = ema_unpool(states, gate, reads)
    ordered = ema_unpool(states, gate, reads[order])
    torch.testing.assert_close(out[order], ordered)


# ---- gates, documents, NaN: both implementations ----------------------------------------------


def placed(way: Way, *tensors: Tensor) -> list[Tensor]:
    return [
        x.detach().to(way.device, way.dtype if x.is_floating_point() else x.dtype) for x in tensors
    ]


def rows_of_one_column(way: Way, states: Tensor, gate: Tensor, **options: Any) -> Tensor:
    """One row for each patch, patches of equal entries."""
    reads = torch.arange(len(gate), device=gate.device)
    out = ema_unpool(states[:, None].expand(-1, 2), gate, reads, impl=way.impl, **options)
    return out[:, 0].cpu()


@BOTH_IMPLEMENTATIONS
def test_nan_stays_with_what_depends_on_it(way: Way) -> None:
    states, gate, documents = placed(way, torch.ones(50), torch.full((50,), 0.5), ints(0, 20, 45))
    wanted = torch.ones(50, dtype=torch.bool)
    gate[30] = 1.0  # forgets what was before it, be it NaN
    states[45:], gate[45:] = NAN, NAN  # unused slots
    wanted[24:30] = False
    for poisoned in (states, gate):
        clean = poisoned[24].clone()
        poisoned[24] = NAN
        out = rows_of_one_column(way, states, gate, cu_seqlens=documents)
        assert torch.equal(out.isfinite(), wanted)
        assert not out[45:].any()
        poisoned[24] = clean


@BOTH_IMPLEMENTATIONS
def test_nan_upstream_reaches_no_later_patch_and_no_other_document(way: Way) -> None:
    states, gate, documents = placed(
        way, torch.ones(50, 2), torch.full((50,), 0.5), ints(0, 20, 45)
    )
    gate[30] = 1.0
    states[45:], gate[45:] = NAN, NAN
    states.requires_grad_(), gate.requires_grad_()
    reads = torch.arange(-5, 45, device=way.device).clamp(min=-1)
    out = ema_unpool(states, gate, reads, cu_seqlens=documents, impl=way.impl)
    upstream = torch.ones_like(out)
    upstream[5 + 33] = NAN
    dstates, dgate = torch.autograd.grad(out, [states, gate], upstream)
    dirty = torch.zeros(50, dtype=torch.bool)
    dirty[30:34] = True
    assert torch.equal(dstates[:, 0].isnan().cpu(), dirty)
    assert torch.equal(dgate.isnan().cpu(), dirty)
    assert not dstates[45:].any()
    assert not dgate[45:].any()


@BOTH_IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("kind", "boundaries"),
    [("tiny", (0, 40)), ("zero", (0, 40)), ("half", (0, 37, 37, 40)), ("edges", (0, 5, 38))],
)
def test_any_gate_over_long_documents(way: Way, kind: str, boundaries: tuple[int, ...]) -> None:
    """Look-backs of every length, across blocks of them and of rows, and their gradients."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows the look-back")
    uniform = torch.rand(40)
    gate = {
        "tiny": 1e-3 * uniform,
        "edges": torch.where(uniform < 0.6, (uniform * 5).round().clamp(max=1), uniform),
        "zero": torch.zeros(40),
        "half": torch.full((40,), 0.5),
    }[kind]
    given = dict(zip(("patch_states", "gate", "read_ids", "cu_seqlens"),
                     [torch.randn(40, 3), gate, torch.arange(-3, 38).clamp(min=-1),
                      ints(*boundaries)],
                     strict=True))  # fmt: skip
    upstream = torch.randn(41, 3)

    def run(function: Any, dtype: torch.dtype, device: str, **options: Any) -> list[Tensor]:
        call = {k: v.to(device, dtype if v.is_floating_point() else v.dtype)
                for k, v in given.items()}  # fmt: skip
        leaves = [call["patch_states"].requires_grad_(), call["gate"].requires_grad_()]
        out = function(**call, **options)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]

    got = run(ema_unpool, way.dtype, way.device, impl=way.impl)
    wide, yard = run(reference, torch.float64, "cpu"), run(yardstick, way.dtype, "cpu")
    for name, a, b, c in zip(("out", "dstates", "dgate"), got, wide, yard, strict=True):
        assert_matches(a, b, c, name=name)


@BOTH_IMPLEMENTATIONS
def test_unchecked_ids_out_of_range_are_loud_and_in_bounds(way: Way) -> None:
    far = 2**31 - 1
    reads = torch.tensor([0, 3, -2, 1, far, -far, -1], device=way.device)
    bad = torch.tensor([False, True, True, False, True, True, False])
    states, gate, residual = placed(way, torch.ones(3, 2), torch.full((3,), 0.5), torch.ones(7, 2))

    def total(states: Tensor, gate: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out = ema_unpool(states, gate, reads, residual=residual, impl=way.impl)
        return out.sum(), out

    grads, out = torch.func.grad(total, argnums=(0, 1, 2), has_aux=True)(states, gate, residual)
    assert torch.equal(out.isnan().cpu(), bad[:, None].expand(7, 2))
    assert out[~bad].tolist() == [[1.5, 1.5], [1.75, 1.75], [1, 1]]
    assert grads[0].tolist() == [[0.75] * 2, [0.5] * 2, [0, 0]]
    assert grads[1].tolist() == [3, 1, 0]
    assert grads[2].tolist() == [[1, 1]] * 7


@BOTH_IMPLEMENTATIONS
def test_unchecked_offsets_stay_in_bounds(way: Way) -> None:
    states, gate = placed(way, torch.ones(5, 2), torch.full((5,), 0.5))
    reads = torch.arange(5, device=way.device)
    for boundaries in (ints(2, 900, -7, 3), ints(0, 3, 2**31 - 1)):

        def total(states: Tensor, gate: Tensor, boundaries: Tensor = boundaries) -> Tensor:
            documents = boundaries.to(way.device)
            return ema_unpool(states, gate, reads, cu_seqlens=documents, impl=way.impl).sum()

        with poisoned_memory():
            grads = torch.func.grad(total, argnums=(0, 1))(states, gate)
        assert all(g.isfinite().all() for g in grads)


# ---- precision --------------------------------------------------------------------------------


@BOTH_IMPLEMENTATIONS
def test_a_float32_gate_beside_16_bit_states_is_not_rounded(way: Way) -> None:
    narrow = torch.float16 if way.device == "cpu" else torch.bfloat16
    states = torch.ones(3, 2, dtype=narrow, device=way.device).requires_grad_()
    gate = torch.tensor([1.0, 2.0**-13, 2.0**-13], device=way.device).requires_grad_()
    states.data[1:] = -8192.0 / (1 - 2.0**-9)
    with torch.autocast(way.device, narrow):
        under_autocast = ema_unpool(
            states.float(), gate, torch.arange(3, device=way.device), impl=way.impl
        )
    out = ema_unpool(states, gate, torch.arange(3, device=way.device), impl=way.impl)
    assert out.dtype == narrow
    assert torch.equal(out, under_autocast)
    assert abs(out[2, 0].item() + 1.0) < 0.02
    dstates, dgate = torch.autograd.grad(out.float().sum(), [states, gate])
    assert (dstates.dtype, dgate.dtype) == (narrow, torch.float32)
    assert dstates[2].tolist() == [2.0**-13] * 2


@BOTH_IMPLEMENTATIONS
def test_gradients_accumulate_wide(way: Way) -> None:
    states, gate = placed(way, torch.ones(2, 1), torch.ones(2))
    rows = 65 if way.impl == "triton" and way.device == "cpu" else 1000
    reads = torch.cat([ints(-1).expand(5), ints(1).expand(rows)]).to(way.device)
    out = ema_unpool(states.requires_grad_(), gate, reads, impl=way.impl)
    upstream = torch.full_like(out, 0.25)
    upstream[5] = 2.0**14  # in a 16-bit sum, quarters beside it would vanish
    (gradient,) = torch.autograd.grad(out, states, upstream)
    want = torch.tensor(2.0**14 + (rows - 1) / 4, dtype=way.dtype).item()
    assert gradient.flatten().tolist() == [0, want]


# ---- against the reference -----------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Any gates and documents; unread patches, and rows that read nothing."""
    patches, width = draw(st.integers(0, 2 * CHUNK + 3)), draw(st.integers(1, 3))
    reads: list[int] = []
    for patch in range(patches):
        reads += [-1] * draw(st.integers(0, 1)) + [patch] * draw(st.integers(0, 2))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    halves = torch.randint(0, 5, (patches,), generator=rng).clamp(max=4) / 4
    ends = sorted(draw(st.lists(st.integers(0, patches), max_size=4)))
    return {
        "patch_states": torch.randn(patches, width, generator=rng, dtype=torch.float64),
        "gate": halves.double(),
        "read_ids": ints(*reads),
        "cu_seqlens": draw(st.sampled_from([None, ints(0, *ends)])),
        "residual": draw(st.sampled_from([None, torch.ones(len(reads), width).double()])),
    }


@given(calls())
def test_equals_the_reference(call: dict[str, Any]) -> None:
    def run(function: Any) -> list[Tensor]:
        given = {
            k: x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x
            for k, x in call.items()
        }
        leaves = [x for x in given.values() if x is not None and x.requires_grad]
        out = function(**given)
        grads = torch.autograd.grad(
            (out.square().sum() + sum(x.sum() for x in leaves)), leaves, materialize_grads=True
        )
        return [out, *grads]

    for got, wanted in zip(run(ema_unpool), run(reference), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# ---- derivatives, transforms ------------------------------------------------------------------


@pytest.mark.parametrize("documents", [None, (0, 7, 13)])
def test_derivatives(documents: tuple[int, ...] | None) -> None:
    patches = CHUNK + 6
    reads = torch.arange(-1, patches).repeat_interleave(2)
    boundaries = None if documents is None else ints(*documents)
    leaves = [leaf(patches, 2, dtype=torch.float64), gates(patches, dtype=torch.float64)]
    leaves.append(leaf(len(reads), 2, dtype=torch.float64))

    def function(states: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return ema_unpool(states, gate, reads[1:], cu_seqlens=boundaries, residual=residual[1:])

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (0, 0, 0)])
def test_torch_func(batched: tuple[int | None, ...]) -> None:
    reads, boundaries = ints(-1, 0, 0, 1, 1, -1, 2), ints(0, 2, 3)
    shapes = ((3, 2), (3,), (7, 2))
    given = [
        torch.rand(shape if axis is None else (4, *shape))
        for shape, axis in zip(shapes, batched, strict=True)
    ]

    def square(states: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        out = ema_unpool(states, gate, reads, cu_seqlens=boundaries, residual=residual)
        return out.square().sum()

    def by_hand(index: int) -> tuple[Tensor, ...]:
        leaves = [
            (x if axis is None else x[index]).clone().requires_grad_()
            for x, axis in zip(given, batched, strict=True)
        ]
        return torch.autograd.grad(square(*leaves), leaves)

    got = torch.func.vmap(torch.func.grad(square, argnums=(0, 1, 2)), in_dims=batched)(*given)
    for grads, wanted in zip(got, zip(*map(by_hand, range(4)), strict=True), strict=True):
        torch.testing.assert_close(grads, torch.stack(wanted))


def test_compiles_once_for_sizes_of_a_kind() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ema_unpool, fullgraph=True, backend=counter, dynamic=True)
    for patches in (41, 48, 60):
        leaves = [leaf(patches, 3), gates(patches), leaf(2 * patches, 3)]
        reads, boundaries = torch.arange(2 * patches).int() // 2, ints(0, 30, patches - 4)
        out = compiled(leaves[0], leaves[1], reads, cu_seqlens=boundaries, residual=leaves[2])
        want = ema_unpool(leaves[0], leaves[1], reads, cu_seqlens=boundaries, residual=leaves[2])
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad(out.square().sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# ---- arguments --------------------------------------------------------------------------------

STATES, GATE, READS = torch.zeros(3, 2), torch.ones(3), ints(-1, 0, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_states": STATES.int()}, "patch_states: expected dtype float32 or"),
        ({"patch_states": STATES[:, :0]}, r"patch_states: expected D >= 1, got \(3, 0\)"),
        ({"gate": GATE[:2]}, r"gate: expected shape \(3,\), got \(2,\)"),
        ({"gate": GATE.half()}, "gate: expected dtype float32, got float16"),
        ({"gate": GATE.double()}, "gate: expected dtype float32, got float64"),
        ({"gate": GATE.to("meta")}, "gate: expected device cpu, got meta"),
        ({"gate": torch.tensor([0.5, 0.0, 1.5])}, r"gate: .* in \[0, 1\], got 1.5 at position 2"),
        ({"gate": torch.tensor([NAN, -0.5, 1.5])}, r"gate: .* in \[0, 1\], got -0.5 at position 1"),
        ({"read_ids": READS.float()}, "read_ids: expected dtype uint8 or int16 or int32 or int64"),
        ({"read_ids": READS[None]}, r"read_ids: expected shape \(T,\), got \(1, 4\)"),
        ({"read_ids": ints(0, 1, 1, 0)}, "another run of 0 at position 3"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: expected dtype int32, got int64"),
        ({"cu_seqlens": ints(0, 4)}, "cu_seqlens: expected last entry <= 3, got 4"),
        ({"cu_seqlens": ints(0, 2, 1)}, "cu_seqlens: expected non-decreasing entries, got 1"),
        ({"residual": torch.zeros(3, 2)}, r"residual: expected shape \(4, 2\), got \(3, 2\)"),
        ({"residual": torch.zeros(4, 2).half()}, "residual: expected dtype float32, got float16"),
        ({"impl": "gpu"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema_unpool(**{"patch_states": STATES, "gate": GATE, "read_ids": READS, **arguments})


@pytest.mark.parametrize("bad", [-2, 3])
def test_ids_out_of_range(bad: int) -> None:
    message = rf"read_ids: expected values in \[-1, 2\], got {bad} at position 3"
    with pytest.raises(IndexError, match=message):
        ema_unpool(STATES, GATE, ints(-1, 0, 1, bad))


def test_a_refusal_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"tensors are on cpu .*; .*float64"):
        ema_unpool(STATES.double(), GATE, READS, impl="triton")
    assert any("on cpu" in reason for reason in explain(ema_unpool, STATES, GATE, READS))
