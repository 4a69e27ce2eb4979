"""qk_norm_rope beyond what every op owes: pairs, layouts, dtypes, bad positions, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.ops import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stlm_kernels import _launch, explain, qk_norm_rope
from stlm_kernels._torch import rotary
from stlm_kernels.ops.qk_norm_rope.reference import reference, yardstick
from stlm_kernels.testing import assert_matches

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
NAMES = ("q", "k", "q_weight", "k_weight")
SMALL = {
    f"qk_norm_rope_{kernel}": {"BLOCK": block, "num_warps": 4}
    for kernel, block in (("fwd", 16), ("bwd", 8))
}


def tables(positions: int, width: int, way: Way) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 50.0 ** -(torch.arange(0, width, 2) / width)
    fine = torch.promote_types(way.dtype, torch.float32)
    return angles.cos().to(way.device, fine), angles.sin().to(way.device, fine)


def example(*lead: int, heads: int, kv_heads: int, width: int, way: Way) -> dict[str, Tensor]:
    """q, k and weights as leaves, cos and sin of as many positions as there are."""
    rng = torch.Generator().manual_seed(sum(lead))
    shapes = [(*lead, heads, width), (*lead, kv_heads, width), (width,), (width,)]
    leaves = {
        name: torch.randn(shape, generator=rng).to(way.device, way.dtype).requires_grad_()
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    cos, sin = tables(lead[-1], width, way)
    return leaves | {"cos": cos, "sin": sin}


def with_gradients(call: dict[str, Any], function: Any, **options: Any) -> dict[str, Tensor]:
    leaves = {name: call[name] for name in NAMES if call.get(name) is not None}
    out = function(**call, **options)
    rng = torch.Generator().manual_seed(1)
    ups = [(torch.randn(x.shape, generator=rng) * 8).round().div(8).to(x) for x in out]
    grads = torch.autograd.grad(out, list(leaves.values()), ups)
    return {"out_q": out[0], "out_k": out[1], **dict(zip(leaves, grads, strict=True))}


def assert_close_to_reference(call: dict[str, Any], way: Way) -> dict[str, Tensor]:
    with _launch.overriding(SMALL):
        got = with_gradients(call, qk_norm_rope, impl=way.impl)

    def stored(dtype: torch.dtype | None) -> dict[str, Any]:
        found = {}
        for name, x in call.items():
            if isinstance(x, Tensor):
                x = x.detach().cpu().clone()
                x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
                x = x.requires_grad_() if name in NAMES else x
            found[name] = x
        return found

    want = with_gradients(stored(torch.float64), reference)
    yard = with_gradients(stored(None), yardstick)
    for name, x in got.items():
        assert_matches(x, want[name], yard[name], name=name)
    return got


# ---- by hand ----------------------------------------------------------------------------------


@EVERY_LANE
def test_pairs_by_hand(way: Way) -> None:
    """A quarter turn takes (a, b) to (-b, a); nothing else is in the way."""
    q = torch.arange(1.0, 9.0, device=way.device, dtype=way.dtype).view(2, 1, 4)
    cos, sin = (x.to(q) for x in (torch.tensor([[1, 1], [0, 0]]), torch.tensor([[0, 0], [1, 1]])))
    halves, _ = qk_norm_rope(q, q, cos, sin, impl=way.impl)
    assert halves.flatten(1).tolist() == [[1, 2, 3, 4], [-7, -8, 5, 6]]
    neighbours, _ = qk_norm_rope(q, q, cos, sin, interleaved=True, impl=way.impl)
    assert neighbours.flatten(1).tolist() == [[1, 2, 3, 4], [-6, 5, -8, 7]]
    at = torch.tensor([1, 0], device=way.device)
    turned, _ = qk_norm_rope(q, q, cos, sin, positions=at, impl=way.impl)
    assert turned.flatten(1).tolist() == [[-3, -4, 1, 2], [5, 6, 7, 8]]


@EVERY_LANE
def test_the_norm_by_hand(way: Way) -> None:
    q = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]], device=way.device, dtype=way.dtype)
    weight = torch.tensor([2.0, 1.0], device=way.device, dtype=way.dtype)
    cos, sin = torch.ones_like(q[:, 0, :1]), torch.zeros_like(q[:, 0, :1])
    got, bare = qk_norm_rope(q, q, cos, sin, q_weight=weight, eps=12.5, impl=way.impl)
    want = torch.tensor([[[1.2, 0.8]], [[0.0, 0.0]]]).to(got)
    torch.testing.assert_close(got, want)
    assert torch.equal(bare, q)


# ---- against the reference -----------------------------------------------------------------------


@EVERY_LANE
@settings(max_examples=4)
@given(
    lead=st.sampled_from([(7,), (2, 5), (3, 1)]),
    heads=st.sampled_from([(3, 1), (2, 2)]),
    width=st.sampled_from([6, 16]),
    interleaved=st.booleans(),
    places=st.sampled_from(["none", "shared", "each"]),
)
def test_any_layout(
    way: Way,
    lead: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    interleaved: bool,
    places: str,
) -> None:
    call: dict[str, Any] = example(*lead, heads=heads[0], kv_heads=heads[1], width=width, way=way)
    if places != "none":
        shape = lead if places == "each" else lead[-1:]
        rng = torch.Generator().manual_seed(3)
        call["positions"] = torch.randint(lead[-1], shape, generator=rng).to(way.device)
    assert_close_to_reference(call | {"interleaved": interleaved}, way)


@EVERY_LANE
@pytest.mark.parametrize("programs", [1, 3])
def test_weights_gradients_of_several_runs(
    way: Way, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of several blocks, the last ones not full."""
    if way.impl == "torch" and programs > 1:
        pytest.skip("the torch path has no runs")
    monkeypatch.setitem(SMALL["qk_norm_rope_bwd"], "PROGRAMS", programs)
    assert_close_to_reference(example(11, heads=3, kv_heads=1, width=16, way=way), way)


@pytest.mark.parametrize("elements", [1, 60, 150, 400])
@pytest.mark.parametrize("places", [None, [4, 0, 1, 1, 3]])
@pytest.mark.parametrize("interleaved", [False, True])
def test_chunks_of_a_batch_and_of_a_row(
    elements: int, places: list[int] | None, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks on a CPU: a row, some rows, a document, two documents; the last ones are shorter."""
    monkeypatch.setattr(rotary, "CHUNK_ELEMENTS", elements)
    way = Way("torch", "cpu", torch.float32)
    call: dict[str, Any] = example(3, 5, heads=2, kv_heads=1, width=16, way=way)
    if places is not None:
        call["positions"] = torch.tensor(places)
    assert_close_to_reference(call | {"interleaved": interleaved}, way)


def test_blocks_are_differentiated_twice_and_many_times_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotary, "CHUNK_ELEMENTS", 8)
    call = example(2, 2, heads=2, kv_heads=1, width=4, way=Way("torch", "cpu", torch.float64))
    leaves = tuple(call[name] for name in NAMES)

    def turned(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(
            q, k, call["cos"], call["sin"], q_weight=weights[0], k_weight=weights[1]
        )

    assert torch.autograd.gradcheck(turned, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(turned, leaves)


@EVERY_LANE
def test_packed_projections_are_read_where_they_lie(way: Way) -> None:
    plain = example(2, 5, heads=4, kv_heads=2, width=16, way=way)
    packed = torch.full((2, 5, 8, 16), math.nan, device=way.device, dtype=way.dtype)
    packed[:, :, :4], packed[:, :, 4:6] = plain["q"].detach(), plain["k"].detach()
    views = {"q": packed[:, :, :4], "k": packed[:, :, 4:6]}
    turned = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in views.items()}
    want = with_gradients(plain, qk_norm_rope, impl=way.impl)
    for layout in (views, turned):
        leaves = {name: x.detach().requires_grad_() for name, x in layout.items()}
        got = with_gradients(plain | leaves, qk_norm_rope, impl=way.impl)
        eps = torch.finfo(way.dtype).eps
        for name, x in got.items():
            torch.testing.assert_close(x, want[name], rtol=16 * eps, atol=16 * eps)
        assert got["out_q"].is_contiguous()


@EVERY_LANE
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_positions_of_every_type(way: Way, dtype: torch.dtype) -> None:
    call: dict[str, Any] = example(4, heads=1, kv_heads=1, width=16, way=way)
    given = torch.tensor([3, 0, 1, 1], device=way.device)
    want = qk_norm_rope(**call, positions=given, impl=way.impl)
    got = qk_norm_rope(**call, positions=given.to(dtype), impl=way.impl)
    assert_same({"q": got[0], "k": got[1]}, {"q": want[0], "k": want[1]})


@EVERY_LANE
def test_tables_and_weights_of_either_width(way: Way) -> None:
    """fp32 ones are not rounded, ones in q's dtype are taken as they are."""
    call: dict[str, Any] = example(5, heads=2, kv_heads=1, width=16, way=way)
    narrow = call | {name: call[name].to(way.dtype) for name in ("cos", "sin")}
    assert_close_to_reference(narrow, way)
    wide = dict(call)
    for name in ("q_weight", "k_weight"):
        fine = torch.promote_types(way.dtype, torch.float32)
        wide[name] = (call[name].detach().to(fine) + 1e-4).requires_grad_()
    got = assert_close_to_reference(wide, way)
    assert got["q_weight"].dtype == wide["q_weight"].dtype


@EVERY_LANE
def test_an_unchecked_bad_position_is_loud(way: Way) -> None:
    if way.dtype != torch.float32:
        pytest.skip("positions do not know the dtype")
    call: dict[str, Any] = example(6, heads=2, kv_heads=1, width=16, way=way)
    given = torch.tensor([0, 6, 2, -1, 2**31 - 1, 5], dtype=torch.int32, device=way.device)
    bad = torch.tensor([False, True, False, True, True, False])
    tables = {name: call[name] for name in ("cos", "sin")}

    def turned(*leaves: Tensor) -> Any:
        named = dict(zip(NAMES, leaves, strict=True))
        return qk_norm_rope(**named, **tables, positions=given, impl=way.impl)

    out, pull = torch.func.vjp(turned, *(call[name].detach() for name in NAMES))
    grads = pull(tuple(map(torch.ones_like, out)))
    got = {"out_q": out[0], "out_k": out[1], **dict(zip(NAMES, grads, strict=True))}
    for name in ("out_q", "out_k", "q", "k"):
        rows = got[name].isnan().flatten(1)
        assert torch.equal(rows.any(1).cpu(), bad), name
        assert torch.equal(rows.all(1).cpu(), bad), name
    assert got["q_weight"].isnan().all()
    assert got["k_weight"].isnan().all()


@EVERY_LANE
def test_nan_stays_in_its_head(way: Way) -> None:
    call: dict[str, Any] = example(6, heads=2, kv_heads=1, width=16, way=way)
    clean = with_gradients(call, qk_norm_rope, impl=way.impl)
    sick = call["q"].detach().clone()
    sick[3, 1, 4] = math.nan
    got = with_gradients(call | {"q": sick.requires_grad_()}, qk_norm_rope, impl=way.impl)
    assert got["out_q"][3, 1].isnan().all()
    for name in ("out_q", "q"):
        got[name][3, 1] = clean[name][3, 1]
    for name in ("out_q", "out_k", "q", "k", "k_weight"):
        torch.testing.assert_close(got[name], clean[name])


# ---- arguments --------------------------------------------------------------------------------

Q, TABLE, W = torch.zeros(2, 6, 4, 16), torch.zeros(6, 8), torch.ones(16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, ValueError, "q: expected dtype float32 or bfloat16 or float16 or float64"),
        ({"q": Q[0, 0]}, ValueError, r"q: expected shape \(T, H, K\), got \(4, 16\)"),
        ({"q": [1.0]}, ValueError, "q: expected a Tensor, got list"),
        ({"q": Q[..., :7]}, ValueError, r"q: expected H >= 1 and an even K >= 2"),
        ({"q": Q[..., :0]}, ValueError, r"q: expected H >= 1 and an even K >= 2"),
        ({"q": Q[:, :, :0]}, ValueError, r"q: expected H >= 1 and an even K >= 2"),
        ({"k": Q[:, :5]}, ValueError, r"k: expected shape \(2, 6, H_kv, 16\), got \(2, 5, 4, 16\)"),
        ({"k": Q[0]}, ValueError, r"k: expected shape \(2, 6, H_kv, 16\), got \(6, 4, 16\)"),
        ({"k": Q.half()}, ValueError, "k: expected dtype float32, got float16"),
        ({"k": Q[:, :, :0]}, ValueError, "k: expected H_kv >= 1"),
        ({"cos": TABLE[:, :7]}, ValueError, r"cos: expected shape \(n_positions, 8\)"),
        ({"cos": TABLE.half()}, ValueError, "cos: expected dtype float32, got float16"),
        ({"cos": TABLE[:5], "sin": TABLE[:5]}, ValueError, "cos: expected at least T = 6 pos"),
        ({"sin": TABLE[:5]}, ValueError, r"sin: expected shape \(6, 8\), got \(5, 8\)"),
        ({"sin": TABLE.to("meta")}, ValueError, "sin: expected device cpu, got meta"),
        (
            {"sin": TABLE.clone().requires_grad_()},
            ValueError,
            "sin: expected a table without gradient, got one that requires it",
        ),
        ({"q_weight": W[:8]}, ValueError, r"q_weight: expected shape \(16,\), got \(8,\)"),
        ({"k_weight": W.half()}, ValueError, "k_weight: expected dtype float32, got float16"),
        ({"eps": -1e-6}, ValueError, "eps: expected a finite number >= 0, got -1e-06"),
        ({"eps": True}, ValueError, "eps: expected a finite number >= 0, got True"),
        ({"eps": math.nan}, ValueError, "eps: expected a finite number >= 0, got nan"),
        ({"interleaved": 1}, ValueError, "interleaved: expected a bool, got 1"),
        ({"positions": W[:6]}, ValueError, "positions: expected dtype uint8 or int16 or int32"),
        ({"positions": torch.zeros(5).int()}, ValueError, r"positions: expected shape \(6,\)"),
        ({"positions": torch.zeros(1, 6).int()}, ValueError, r"positions: expected shape \(2, 6"),
        (
            {"positions": torch.tensor([0, 1, 6, 0, 0, -1])},
            IndexError,
            r"positions: expected values in \[0, 5\], got 6 at position 2",
        ),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"q": Q, "k": Q, "cos": TABLE, "sin": TABLE, "q_weight": W, "k_weight": W}
    with pytest.raises(error, match=message):
        qk_norm_rope(**(good | change))


def test_learned_tables_are_taken_where_no_gradient_is_asked_for() -> None:
    learned = TABLE.clone().requires_grad_()
    with torch.no_grad():
        qk_norm_rope(Q, Q, learned, learned)


def test_a_refusal_lists_every_reason() -> None:
    q, table = torch.zeros(3, 1, 300, dtype=torch.float64), torch.zeros(3, 150)
    message = r"tensors are on cpu .*; q is torch.float64; .*heads are 300 wide"
    with pytest.raises(NotImplementedError, match=message):
        qk_norm_rope(q, q, table, table, impl="triton")
    assert any("300 wide" in reason for reason in explain(qk_norm_rope, q, q, table, table))
