"""qkv_rope beyond what every op owes: parts of rows, heads and columns, what is kept, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers.lanes import Way
from helpers.op_matches import assert_op_matches
from helpers.ops import assert_same, inputs_of, results, run, upstream_of
from torch import Tensor

from stlm_kernels import _launch, explain, qk_norm_rope, qkv_rope
from stlm_kernels._torch import rotary
from stlm_kernels.ops.qkv_rope import config, torch_impl
from stlm_kernels.ops.qkv_rope.cases import SPEC
from stlm_kernels.spec import case

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
FP32 = Way("torch", "cpu", torch.float32)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few rows on a CPU: 8 of one head of 32 columns."""
    monkeypatch.setattr(torch_impl, "FEW_ROWS", 0)
    monkeypatch.setattr(rotary, "CHUNK_ELEMENTS", 256)


@EVERY_LANE
def test_the_parts_by_hand(way: Way) -> None:
    """One head of two columns each: norm of (3, 4), a product that doubles, a quarter turn."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=way.device, dtype=way.dtype)
    weight = torch.eye(2).repeat(3, 1).to(x) * 2
    cos, sin = (torch.full((2, 1), value).to(x) for value in (0.0, 1.0))
    options: Any = {"heads": 1, "kv_heads": 1, "eps": 12.5, "impl": way.impl}
    q, k, v = qkv_rope(x, torch.tensor([1.0, 2.0]).to(x), weight, cos, sin, **options)
    assert v.tolist()[1] == [[0.0, 0.0]]
    torch.testing.assert_close(v[0, 0].cpu().float(), torch.tensor([1.2, 3.2]), rtol=1e-2, atol=0)
    for turned in (q, k):
        torch.testing.assert_close(turned[0, 0], torch.stack((-v[0, 0, 1], v[0, 0, 0])))


@EVERY_LANE
@pytest.mark.one_dtype
def test_heads_are_those_of_qk_norm_rope(way: Way) -> None:
    inputs = inputs_of(SPEC, SPEC.tagged("smoke")[0], way)
    with torch.no_grad():
        q, k, v = qkv_rope(**inputs, impl=way.impl)
        unturned = {name: x for name, x in inputs.items() if name not in ("q_weight", "k_weight")}
        unturned["sin"] = torch.zeros_like(inputs["sin"])
        unturned["cos"] = torch.ones_like(inputs["cos"])
        plain_q, plain_k, plain_v = qkv_rope(**unturned, impl=way.impl)
        names = ("cos", "sin", "q_weight", "k_weight", "eps")
        want = qk_norm_rope(plain_q, plain_k, **{name: inputs[name] for name in names})
    assert torch.equal(v, plain_v)
    for got, expected in zip((q, k), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert all(x.is_contiguous() for x in (q, k, v))


LAYOUTS = (
    case(B=3, T=5, D=64, H=3, KV=2, K=32, norm="qk", gain="own", positions="dense"),
    case(T=37, D=70, H=1, KV=1, K=36, norm="q", positions="packed"),
    case(B=2, T=19, D=40, H=2, KV=1, K=32, norm="k"),
    case(B=9, T=2, D=40, H=1, KV=2, K=32, norm="none", gain="own"),
)


@pytest.mark.lanes("cpu")
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("shape", LAYOUTS, ids=lambda shape: shape.name)
def test_chunks_of_a_batch_and_of_a_row(shape: Any, way: Way) -> None:
    """Some rows of a document, two documents; the last chunks are shorter."""
    assert_op_matches(SPEC, shape, way)


@pytest.mark.parametrize("weights", ["even", "uneven", "with a zero"])
@pytest.mark.usefixtures("chunked")
def test_normed_heads_come_from_results_or_products(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results tell what was normed unless a weight of heads is far smaller than another."""
    scale = {"even": [0.5, 1.0], "uneven": [1e-3, 1.0], "with a zero": [0.0, 1.0]}[weights]

    def make_inputs(*args: Any) -> Any:
        inputs = SPEC.make_inputs(*args)
        for name in ("q_weight", "k_weight"):
            inputs[name] = torch.linspace(*scale, 32).to(inputs[name])
        return inputs

    used: list[str] = []
    for name in ("_FromResults", "_FromProducts"):
        kind = getattr(torch_impl, name)

        def made(*args: Any, kind: Any = kind) -> Any:
            used.append(kind.__name__)
            return kind(*args)

        monkeypatch.setattr(torch_impl, name, made)
    shape = case(B=2, T=19, D=40, H=2, KV=1, K=32, norm="qk")
    assert_op_matches(replace(SPEC, make_inputs=make_inputs), shape, FP32)
    assert set(used) == {"_FromResults" if weights == "even" else "_FromProducts"}


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.one_dtype
@pytest.mark.parametrize("shape", LAYOUTS[:2], ids=lambda shape: shape.name)
@pytest.mark.parametrize("most", [1, 2])
def test_groups_of_heads_and_columns_in_parts(
    shape: Any, most: int, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of one head, or of two of different kinds; columns of x by 32."""
    monkeypatch.setattr(config, "heads_of_program", lambda *_: most)
    small = {"BLOCK": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
    norm = {"BLOCK": 4, "PROGRAMS": 2, "num_warps": 4}
    configs = {"qkv_rope_fwd": small, "qkv_rope_bwd": small, "qkv_rope_bwd_norm": norm}
    with _launch.overriding(configs):
        assert_op_matches(SPEC, shape, way)


@pytest.mark.lanes("cpu", "interpret", "compiled", "gpu")
@pytest.mark.parametrize("gain", [{}, {"gain": "own"}])
def test_x_that_goes_on_beside(gain: dict[str, str], way: Way) -> None:
    """Compare it with x, and its gradient with the part of x's."""
    sizes: Any = {"B": 2, "T": 33, "D": 72, "H": 2, "KV": 1, "K": 32, "norm": "qk", **gain}
    assert_op_matches(SPEC, case(**sizes, residual="own"), way)
    inputs = inputs_of(SPEC, case(**sizes), way)
    out = qkv_rope(**inputs, residual=True, impl=way.impl)
    assert torch.equal(out[3], inputs["x"])
    assert out[3].data_ptr() == inputs["x"].data_ptr()
    (alone,) = torch.autograd.grad(out[3], inputs["x"], torch.ones_like(out[3]))
    assert torch.equal(alone, torch.ones_like(alone))


@pytest.mark.usefixtures("chunked")
def test_chunks_are_differentiated_twice_and_many_times_at_once() -> None:
    shape = case(B=2, T=9, D=6, H=1, KV=1, K=4, norm="qk", gain="own")
    inputs = inputs_of(SPEC, shape, Way("torch", "cpu", torch.float64))
    leaves = [inputs[name] for name in SPEC.grad_args]

    def heads(*given: Tensor) -> Any:
        return qkv_rope(**(inputs | dict(zip(SPEC.grad_args, given, strict=True))))

    assert torch.autograd.gradcheck(heads, leaves, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(heads, leaves, fast_mode=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs["x"].detach(), inputs["x"].detach())
        tangent = torch.autograd.forward_ad.unpack_dual(qkv_rope(**(inputs | {"x": dual}))[0])
    assert tangent.tangent.isfinite().all()


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.usefixtures("chunked")
def test_nothing_is_kept_but_arguments_and_results(way: Way) -> None:
    """And one number of each head, where a CPU takes the gradients from the results."""
    inputs = inputs_of(SPEC, SPEC.tagged("smoke")[1], way)
    given = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = qkv_rope(**inputs, impl=way.impl)
    assert kept
    given |= {x.untyped_storage().data_ptr() for x in out}
    rest = [x for x in kept if x.untyped_storage().data_ptr() not in given]
    heads = out[0].shape[-2] + out[1].shape[-2]
    assert sum(x.numel() for x in rest) <= (70 * heads if way.impl == "torch" else 0)


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.usefixtures("chunked")
def test_a_checkpoint_gives_the_same_gradients(way: Way) -> None:
    inputs = inputs_of(SPEC, SPEC.tagged("smoke")[1], way)

    def again(**given: Any) -> Any:
        call = partial(qkv_rope, **given, impl=way.impl)
        return torch.utils.checkpoint.checkpoint(call, use_reentrant=False)

    plain = run(SPEC, qkv_rope, inputs, impl=way.impl)[1]
    assert_same(run(SPEC, again, inputs)[1], plain)


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("norm_weight", "k_weight"), ("q_weight",)]
)
@pytest.mark.usefixtures("chunked")
def test_only_the_gradients_that_are_needed(wanted: tuple[str, ...], way: Way) -> None:
    inputs = inputs_of(SPEC, LAYOUTS[0], way)
    _, every = run(SPEC, qkv_rope, inputs, impl=way.impl)
    some = {
        name: x.detach() if isinstance(x, Tensor) and name not in wanted else x
        for name, x in inputs.items()
    }
    outputs = results(qkv_rope(**some, impl=way.impl))
    ups = {name: up for name, up in upstream_of(outputs).items() if outputs[name].requires_grad}
    heads = [outputs[name] for name in ups]
    grads = torch.autograd.grad(heads, [some[name] for name in wanted], list(ups.values()))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, every[name])


@EVERY_LANE
@pytest.mark.one_dtype
def test_an_unchecked_bad_position_is_loud(way: Way) -> None:
    shape = case(T=6, D=64, H=2, KV=1, K=32, norm="qk")
    inputs = inputs_of(SPEC, shape, way)
    given = torch.tensor([0, 6, 2, -1, 2**31 - 1, 5], dtype=torch.int32, device=way.device)
    x = inputs.pop("x").detach()
    out, pull = torch.func.vjp(lambda x: qkv_rope(x, **inputs, positions=given, impl=way.impl), x)
    (dx,) = pull(tuple(map(torch.ones_like, out)))
    bad = torch.tensor([False, True, False, True, True, False])
    for got in (*out[:2], dx):
        assert torch.equal(got.isnan().flatten(1).all(1).cpu(), bad)
        assert torch.equal(got.isnan().flatten(1).any(1).cpu(), bad)
    assert out[2].isfinite().all()


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.usefixtures("chunked")
def test_nan_stays_in_its_row(way: Way) -> None:
    inputs = inputs_of(SPEC, case(T=20, D=64, H=2, KV=1, K=32, norm="qk"), way)
    clean = run(SPEC, qkv_rope, inputs, impl=way.impl)
    sick = inputs["x"].detach().clone()
    sick[3, 4] = math.nan
    got = run(SPEC, qkv_rope, inputs | {"x": sick.requires_grad_()}, impl=way.impl)
    assert all(x[3].isnan().all() for x in got[0].values())
    others = torch.arange(20, device=way.device) != 3
    for name, x in got[0].items():
        torch.testing.assert_close(x[others], clean[0][name][others])
    torch.testing.assert_close(got[1]["x"][others], clean[1]["x"][others])


# ---- arguments --------------------------------------------------------------------------------

X, W, TABLE, GAIN = torch.zeros(2, 6, 64), torch.zeros(128, 64), torch.zeros(6, 16), torch.ones(32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, ValueError, "x: expected dtype float32 or bfloat16 or float16"),
        ({"x": X[0, 0]}, ValueError, r"x: expected shape \(T, D\), got \(64,\)"),
        ({"x": X[None]}, ValueError, r"x: expected shape \(T, D\)"),
        ({"x": X[..., :0]}, ValueError, "x: expected D >= 1"),
        ({"x": [1.0]}, ValueError, "x: expected a Tensor, got list"),
        ({"weight": W[:, :60]}, ValueError, r"weight: expected shape \(\(H \+ 2 H_kv\) K, 64\)"),
        ({"weight": W[:126]}, ValueError, "weight: expected rows of 4 heads of an even K >= 2"),
        ({"weight": W[:12]}, ValueError, "weight: expected rows of 4 heads of an even K >= 2"),
        ({"weight": W[:0]}, ValueError, "weight: expected rows of 4 heads of an even K >= 2"),
        ({"weight": W.half()}, ValueError, "weight: expected dtype float32, got float16"),
        ({"weight": W.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
        ({"heads": 0}, ValueError, "heads: expected an int >= 1, got 0"),
        ({"heads": 2.0}, ValueError, "heads: expected an int >= 1, got 2.0"),
        ({"kv_heads": True}, ValueError, "kv_heads: expected an int >= 1, got True"),
        ({"heads": 6}, ValueError, r"cos: expected shape \(n_positions, 8\)"),
        ({"norm_weight": GAIN}, ValueError, r"norm_weight: expected shape \(64,\), got \(32,\)"),
        ({"cos": TABLE[:, :7]}, ValueError, r"cos: expected shape \(n_positions, 16\)"),
        ({"cos": TABLE[:5], "sin": TABLE[:5]}, ValueError, "cos: expected at least T = 6 pos"),
        ({"sin": TABLE.clone().requires_grad_()}, ValueError, "sin: expected a table without"),
        ({"q_weight": GAIN[:8]}, ValueError, r"q_weight: expected shape \(32,\), got \(8,\)"),
        ({"k_weight": GAIN.half()}, ValueError, "k_weight: expected dtype float32, got float16"),
        ({"eps": -1e-6}, ValueError, "eps: expected a finite number >= 0, got -1e-06"),
        ({"positions": torch.zeros(5).int()}, ValueError, r"positions: expected shape \(6,\)"),
        ({"positions": torch.zeros(1, 6).int()}, ValueError, r"positions: expected shape \(2, 6"),
        (
            {"positions": torch.tensor([0, 1, 6, 0, 0, -1])},
            IndexError,
            r"positions: expected values in \[0, 5\], got 6 at position 2",
        ),
        ({"residual": 1}, ValueError, "residual: expected a bool, got 1"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": X, "norm_weight": None, "weight": W, "cos": TABLE, "sin": TABLE}
    good |= {"heads": 2, "kv_heads": 1, "q_weight": GAIN, "k_weight": GAIN}
    with pytest.raises(error, match=message):
        qkv_rope(**(good | change))


def test_a_refusal_lists_every_reason() -> None:
    x, weight = torch.zeros(3, 1100, dtype=torch.float64), torch.zeros(3 * 130, 1100).double()
    call: Any = (x, None, weight, torch.zeros(3, 65).double(), torch.zeros(3, 65).double())
    message = r"tensors are on cpu .*; x is torch.float64; .*heads are 130 wide.*x has 1100 columns"
    with pytest.raises(NotImplementedError, match=message):
        qkv_rope(*call, heads=1, kv_heads=1, impl="triton")
    reasons = explain(qkv_rope, *call, heads=1, kv_heads=1)
    assert any("reading the weight for each block of rows costs more" in x for x in reasons)
