"""swiglu beyond what every op owes: by hand, chunks, runs, memory, dispatch, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lanes import Way
from helpers.op_matches import assert_op_matches
from helpers.ops import LargestTensor, inputs_of
from torch import Tensor

from stlm_kernels import _launch, explain, swiglu
from stlm_kernels.ops.swiglu import config, torch_impl
from stlm_kernels.ops.swiglu.cases import SPEC
from stlm_kernels.spec import case

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


@EVERY_LANE
@pytest.mark.parametrize("residual", [True, False])
def test_by_hand(way: Way, residual: bool) -> None:
    """(3, 4) over sqrt(12.5 + 12.5) is (0.6, 0.8), (1.2, 0.8) by the weight; zeros stay zeros."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=way.device, dtype=way.dtype)
    weight = torch.tensor([2.0, 1.0]).to(x)
    gate_up = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(x)  # gate 1.2, up 0.8
    down = torch.tensor([[1.0], [-2.0]]).to(x)
    got = swiglu(x, weight, gate_up, down, residual=residual, eps=12.5, impl=way.impl)
    act = 1.2 / (1 + math.exp(-1.2)) * 0.8
    want = torch.tensor([[act, -2 * act], [0.0, 0.0]]).to(x) + (x if residual else 0)
    torch.testing.assert_close(got, want)


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.parametrize("programs", [1, 3, 7])
def test_runs_of_the_weights_gradients(way: Way, programs: int) -> None:
    """Runs of several blocks, the last ones not full, and hidden layers that end within a tile."""
    small = {"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 4, "PROGRAMS": programs}
    with _launch.overriding({"swiglu_bwd_weights": small}):
        assert_op_matches(SPEC, case("edge", T=70, D=16, F=40, norm="weight"), way)


@pytest.mark.parametrize("elements", [1, 100, 4000])
@pytest.mark.parametrize("norm", ["weight", "none"])
def test_chunks_of_rows(elements: int, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "CHUNK_ELEMENTS", elements)
    for dtype in (torch.float32, torch.bfloat16):
        way = Way("torch", "cpu", dtype)
        assert_op_matches(SPEC, case("edge", T=19, D=16, F=40, norm=norm), way)


def test_chunks_are_differentiated_twice_and_many_times_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_impl, "CHUNK_ELEMENTS", 8)
    inputs = inputs_of(SPEC, case(T=3, D=4, F=5, norm="weight"), Way("torch", "cpu", torch.float64))
    leaves = tuple(inputs[name] for name in SPEC.grad_args)
    assert torch.autograd.gradcheck(swiglu, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(swiglu, leaves)


def test_nothing_as_wide_as_the_hidden_layer_is_kept_or_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU a backward gets x and the weights alone."""
    monkeypatch.setattr(torch_impl, "CHUNK_ELEMENTS", 4096)
    way = Way("torch", "cpu", torch.float32)
    inputs = inputs_of(SPEC, case(T=512, D=16, F=64, norm="none"), way)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = swiglu(**inputs)
    with LargestTensor() as seen:
        swiglu(**inputs)
    with LargestTensor() as back:
        out.sum().backward()
    assert max(seen.elements, back.elements) < 512 * 64
    given = {x.data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    assert kept
    assert all(x.data_ptr() in given for x in kept)


@EVERY_LANE
def test_nan_stays_in_its_row(way: Way) -> None:
    inputs = inputs_of(SPEC, case(T=20, D=16, F=24, norm="none"), way)
    clean = swiglu(**inputs, impl=way.impl)
    (dx,) = torch.autograd.grad(clean.sum(), inputs["x"])
    sick = inputs["x"].detach().clone()
    sick[3, 5] = math.nan
    leaf = sick.requires_grad_()
    got = swiglu(**(inputs | {"x": leaf}), impl=way.impl)
    (got_dx,) = torch.autograd.grad(got.sum(), leaf)
    rows = torch.arange(20, device=way.device) != 3
    assert got[3].isnan().all()
    torch.testing.assert_close(got[rows], clean[rows])
    torch.testing.assert_close(got_dx[rows], dx[rows])


@EVERY_LANE
def test_fp32_weights_beside_16_bits(way: Way) -> None:
    if way.dtype not in (torch.float16, torch.bfloat16):
        pytest.skip("there is no wider weight")
    inputs = inputs_of(SPEC, case(T=9, D=16, F=24, norm="weight"), way)
    wide = {name: inputs[name].detach().float().requires_grad_() for name in ("gate_up", "down")}
    want, got = (swiglu(**(inputs | more), impl=way.impl) for more in ({}, wide))
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in wide.values())


def test_it_is_the_feed_forward_of_others() -> None:
    """By torch's own modules: gate rows first."""
    torch.manual_seed(0)
    x, gate, up = torch.randn(7, 8), torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(8, 12)
    down = torch.nn.Linear(12, 8, bias=False)
    torch.nn.init.zeros_(up.bias)
    normed = F.rms_norm(x, (8,), eps=1e-6)
    want = x + down(F.silu(gate(normed)) * up(normed))
    got = swiglu(x, None, torch.cat([gate.weight, up.weight]), down.weight)
    torch.testing.assert_close(got, want)


# ---- dispatch and arguments ---------------------------------------------------------------------

X, W, GATE_UP, DOWN = torch.zeros(6, 16), torch.ones(16), torch.zeros(40, 16), torch.zeros(16, 20)


def test_auto_declines_what_the_composition_does_better() -> None:
    wide = torch.zeros(3, 300), None, torch.zeros(8, 300), torch.zeros(300, 4)
    assert any("300 wide: beyond 256" in reason for reason in explain(swiglu, *wide))
    assert any("float32 products" in reason for reason in explain(swiglu, *wide))
    narrow = X.bfloat16(), None, GATE_UP.bfloat16(), DOWN.bfloat16()
    assert not config.declined_reasons(x=narrow[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not config.declined_reasons(x=X)
    with pytest.raises(NotImplementedError, match=r"swiglu: .*on cpu.*300 wide; the kernels"):
        swiglu(*wide, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.int()}, "x: expected dtype float32 or bfloat16 or float16 or float64"),
        ({"x": X[None]}, r"x: expected shape \(T, D\), got \(1, 6, 16\)"),
        ({"x": X[:, :0]}, r"x: expected D >= 1, got \(6, 0\)"),
        ({"x": [1.0]}, "x: expected a Tensor, got list"),
        ({"norm_weight": W[:8]}, r"norm_weight: expected shape \(16,\), got \(8,\)"),
        ({"norm_weight": W.half()}, "norm_weight: expected dtype float32, got float16"),
        ({"gate_up": GATE_UP[:, :8]}, r"gate_up: expected shape \(2F, 16\), got \(40, 8\)"),
        ({"gate_up": GATE_UP[:39]}, r"gate_up: expected 2F rows, F >= 1, got \(39, 16\)"),
        ({"gate_up": GATE_UP[:0]}, r"gate_up: expected 2F rows, F >= 1, got \(0, 16\)"),
        ({"gate_up": GATE_UP.double()}, "gate_up: expected dtype float32, got float64"),
        ({"down": DOWN.mT}, r"down: expected shape \(16, 20\), got \(20, 16\)"),
        ({"down": DOWN.to("meta")}, "down: expected device cpu, got meta"),
        ({"eps": -1e-6}, "eps: expected a finite number >= 0, got -1e-06"),
        ({"eps": math.inf}, "eps: expected a finite number >= 0, got inf"),
        ({"residual": 1}, "residual: expected a bool, got 1"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": X, "norm_weight": W, "gate_up": GATE_UP, "down": DOWN}
    with pytest.raises(ValueError, match=message):
        swiglu(**(good | change))
