"""segment_pool beyond what every op owes: NaN, ties, precision, empty patches, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels import ema_unpool, explain, find_patches, segment_pool, unpool
from stlm_kernels.ops.segment_pool import torch_impl
from stlm_kernels.ops.segment_pool.op import MODES
from stlm_kernels.ops.segment_pool.reference import reference

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
ONE_DTYPE = pytest.mark.one_dtype
TORCH = Way("torch", "cpu", torch.float32)


def column(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None].requires_grad_()


def pooled_with_gradient(
    x: Tensor, boundaries: Tensor, mode: str, upstream: Tensor | None = None, way: Way = TORCH
) -> tuple[Tensor, Tensor]:
    """Result and gradient on the way's device, moved back."""
    out = segment_pool(x.to(way.device), boundaries.to(way.device), mode=mode, impl=way.impl)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return out.cpu(), gradient


# ---- NaN, ties, empty patches -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "winner"),
    [
        ((1, 3, 2, 3), 1),
        ((3, 3, 3, 3), 0),
        ((-0.0, 0.0, -1, 0), 0),
        ((1, NAN, 5, NAN), 1),
        ((INF, 2, NAN, INF), 2),
        ((2, INF, INF, 1), 1),
        ((-INF, -INF, -INF, -INF), 0),
        ((-INF, -5, -INF, -5), 1),
    ],
)
@pytest.mark.parametrize("mode", ["max", "min"])
@EVERY_LANE
def test_extremes_give_the_gradient_to_the_first(
    way: Way, mode: str, values: tuple[float, ...], winner: int
) -> None:
    values = values if mode == "max" else tuple(-v for v in values)
    x, upstream = (column(*v, dtype=way.dtype) for v in ((7, *values, 9), (2, 3, 4)))
    out, gradient = pooled_with_gradient(x, ints(0, 1, 5, 6), mode, upstream, way)
    torch.testing.assert_close(out[1, 0], x[1 + winner, 0], equal_nan=True)
    want = [2.0, 0.0, 0.0, 0.0, 0.0, 4.0]
    want[1 + winner] = 3.0
    assert gradient.flatten().tolist() == want


def test_max_tells_neighbouring_float64_values_apart() -> None:
    x = column(1.0, 1.0 + 2**-50, 1.0, dtype=torch.float64)
    _, gradient = pooled_with_gradient(x, ints(0, 3), "max")
    assert gradient.flatten().tolist() == [0, 1, 0]


def test_max_beyond_the_positions_that_float32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "EXACT_IN_FLOAT32", 3)
    seen = []
    monkeypatch.setattr(torch_impl.torch, "arange", _recording(torch.arange, seen))
    _, gradient = pooled_with_gradient(column(1, 5, 2, 5), ints(0, 4), "max")
    assert gradient.flatten().tolist() == [0, 1, 0, 0]
    assert torch.float64 in seen


def _recording(function: Any, seen: list[Any]) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("dtype"))
        return function(*args, **kwargs)

    return recorded


@EVERY_LANE
@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_own_patch(way: Way, mode: str) -> None:
    boundaries = ints(0, 3, 5, 9)
    x = torch.randn(9, 3).to(way.dtype).requires_grad_()
    clean, _ = pooled_with_gradient(x, boundaries, mode, way=way)
    x.data[3:5] = NAN
    upstream = torch.randn(3, 3).to(way.dtype)
    upstream[1] = NAN
    out, gradient = pooled_with_gradient(x, boundaries, mode, upstream, way)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert gradient[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()
    assert gradient[3:5].isnan().any()


@EVERY_LANE
@ONE_DTYPE
@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_no_patch_are_never_read(way: Way, mode: str) -> None:
    x = torch.randn(8, 3)
    want, want_gradient = pooled_with_gradient(x[:5].requires_grad_(), ints(0, 2, 5), mode, way=way)
    x = x.detach()
    x[5:] = NAN
    out, gradient = pooled_with_gradient(x.requires_grad_(), ints(0, 2, 5), mode, way=way)
    assert torch.equal(out, want)
    assert torch.equal(gradient[:5], want_gradient)
    assert torch.equal(gradient[5:], torch.zeros(3, 3))


@EVERY_LANE
@ONE_DTYPE
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("boundaries", [(0, 0, 2, 2, 3, 3), (0, 0, 0), (0, 3, 3), (0, 0, 2)])
def test_empty_patches_are_zero_and_take_no_gradient(
    way: Way, mode: str, boundaries: tuple[int, ...]
) -> None:
    offsets = ints(*boundaries)
    empty = offsets.diff() == 0
    upstream = torch.where(empty[:, None], NAN, torch.ones(len(empty), 2))
    x = torch.randn(3, 2, requires_grad=True)
    out, gradient = pooled_with_gradient(x, offsets, mode, upstream, way)
    assert torch.equal(out[empty], torch.zeros(int(empty.sum()), 2))
    assert gradient.isfinite().all()
    assert torch.equal(gradient[boundaries[-1] :], torch.zeros(3 - boundaries[-1], 2))


# ---- precision --------------------------------------------------------------------------------


@EVERY_LANE
def test_sums_accumulate_wide(way: Way) -> None:
    """A 16-bit sum would lose the ones, which together count in both 16-bit types."""
    x = column(2**14, *[1] * 128, dtype=way.dtype)
    assert pooled_with_gradient(x, ints(0, 129), "sum", way=way)[0].item() == 2**14 + 128


@pytest.mark.lanes("cpu", "gpu")
def test_a_thousand_ones_make_a_thousand(way: Way) -> None:
    ones = torch.ones(1000, 2, dtype=way.dtype, requires_grad=True)
    assert pooled_with_gradient(ones, ints(0, 1000), "sum", way=way)[0].tolist() == [[1000, 1000]]


def test_a_float16_mean_does_not_overflow_where_the_sum_does() -> None:
    x = torch.full((10_000, 2), 60.0, dtype=torch.float16)
    assert segment_pool(x, ints(0, 10_000), mode="mean").tolist() == [[60.0, 60.0]]
    assert segment_pool(x, ints(0, 10_000), mode="sum").isinf().all()


def test_the_gradient_of_a_mean_divides_by_the_exact_length() -> None:
    """bfloat16 has no 1001: dividing by what it is rounded to would be off by a whole step."""
    x = torch.randn(1001, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((1, 1), 1001.0 / 1000 * 64, dtype=torch.bfloat16)
    _, gradient = pooled_with_gradient(x, ints(0, 1001), "mean", upstream)
    want = (upstream.double() / 1001).to(torch.bfloat16)
    assert torch.equal(gradient, want.expand(1001, 1))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_rounds_once_and_keeps_the_gradient_wide(mode: str) -> None:
    x = torch.randn(7, 4, requires_grad=True)
    boundaries = ints(0, 3, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = segment_pool(x, boundaries, mode=mode)
    assert torch.equal(out, segment_pool(x.bfloat16(), boundaries, mode=mode))
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert gradient.dtype == torch.float32
    if mode == "mean":
        assert gradient[0, 0].item() == pytest.approx(1 / 3, rel=1e-6)
    wide = torch.randn(7, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert segment_pool(wide, boundaries, mode=mode).dtype == torch.float64


# ---- against the reference -----------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with ties, NaN and infinities; boundaries with empty patches and a tail."""
    total, width = draw(st.integers(0, 20)), draw(st.integers(1, 3))
    value = st.sampled_from([0.0, 1.0, 1.0, -2.0, 3.0, NAN, INF, -INF])
    values = draw(st.lists(value, min_size=total * width, max_size=total * width))
    boundaries = sorted(draw(st.lists(st.integers(0, total), max_size=8)))
    return {
        "x": torch.tensor(values).view(total, width),
        "cu_patchlens": ints(0, *boundaries),
        "mode": draw(st.sampled_from(MODES)),
    }


@given(calls(), st.sampled_from(FLOATS))
def test_equals_the_reference(call: dict[str, Any], dtype: torch.dtype) -> None:
    x = call["x"].to(dtype).requires_grad_()
    wide = call["x"].double().requires_grad_()
    out = segment_pool(**{**call, "x": x})
    want = reference(**{**call, "x": wide})
    torch.testing.assert_close(out, want.to(dtype), rtol=2e-2, atol=1e-6, equal_nan=True)
    upstream = torch.arange(out.numel()).view(out.shape) % 5 - 2.0
    (gradient,) = torch.autograd.grad(out, x, upstream.to(dtype))
    (wanted,) = torch.autograd.grad(want, wide, upstream.double())
    torch.testing.assert_close(gradient, wanted.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.lanes("cpu", "gpu")
@ONE_DTYPE
def test_far_more_patches_than_a_grid_has_rows(way: Way) -> None:
    """Pool and unpool 70,001 patches; 65,535 is where a grid's second dimension stops."""
    patches = 70_001
    ids = torch.zeros(2 * patches, dtype=torch.uint8, device=way.device)
    x = torch.arange(2 * patches, device=way.device, dtype=way.dtype)[:, None].requires_grad_()
    cut = find_patches(ids, rule="fixed", patch_size=2, max_patches=patches, impl=way.impl)
    pooled = segment_pool(x, cut.cu_patchlens, mode="last", impl=way.impl)
    assert torch.equal(pooled, x[1::2])
    gate = torch.ones(patches, device=way.device)
    back = unpool(pooled, cut.patch_ids, impl=way.impl)
    smooth = ema_unpool(pooled, gate, cut.patch_ids, impl=way.impl)
    assert torch.equal(back, x[1::2].repeat_interleave(2, 0))
    assert torch.equal(back, smooth)
    (gradient,) = torch.autograd.grad((back + smooth).sum(), x)
    assert gradient.view(-1, 2).unique(dim=0).tolist() == [[0, 4]]


# ---- derivatives, transforms, unchecked values ------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_derivatives(mode: str) -> None:
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    boundaries = ints(0, 2, 2, 3, 7)
    assert torch.autograd.gradcheck(lambda x: segment_pool(x, boundaries, mode=mode), x)
    assert torch.autograd.gradgradcheck(lambda x: segment_pool(x, boundaries, mode=mode), x)


@pytest.mark.parametrize("mode", MODES)
def test_torch_func(mode: str) -> None:
    boundaries = ints(0, 2, 2, 3, 7)
    batch = torch.randn(3, 9, 2).round()  # with ties

    def pool(x: Tensor) -> Tensor:
        return segment_pool(x, boundaries, mode=mode)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: pool(x).sum())(x)

    outs = torch.stack([pool(x) for x in batch])
    torch.testing.assert_close(torch.func.vmap(pool)(batch), outs)
    grads = torch.stack(
        [pooled_with_gradient(x.clone().requires_grad_(), boundaries, mode)[1] for x in batch]
    )
    torch.testing.assert_close(torch.func.vmap(gradient)(batch), grads)
    whole = torch.func.grad(lambda b: torch.func.vmap(pool)(b).sum())(batch)
    torch.testing.assert_close(whole, grads)
    jacobian = torch.func.jacrev(pool)(batch[0])
    torch.testing.assert_close(jacobian.sum((0, 1)), grads[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("boundaries", "meaning"),
    [((0, 5, 3, 9), (0, 5, 5, 8)), ((-4, 2, 99), (0, 2, 8)), ((3, 5), (3, 5))],
)
def test_unchecked_boundaries_stay_in_bounds(
    mode: str, boundaries: tuple[int, ...], meaning: tuple[int, ...]
) -> None:
    """Unread values, as under torch.func, are clamped; a negative length is empty."""
    x = torch.randn(8, 2)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        out = segment_pool(x, ints(*boundaries), mode=mode)
        return out.square().sum(), out

    gradient, out = torch.func.grad(loss, has_aux=True)(x)
    wide = x.double().requires_grad_()
    want = reference(wide[: meaning[-1]], ints(*meaning), mode=mode)
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(want.square().sum(), wide)
    torch.testing.assert_close(gradient, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_once_for_all_sizes(mode: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(segment_pool, fullgraph=True, backend=counter, dynamic=True)
    for total in (40, 33, 57):
        x = torch.randn(total, 5, requires_grad=True)
        boundaries = torch.arange(0, total, 7, dtype=torch.int32)  # with a tail
        out, want = compiled(x, boundaries, mode=mode), segment_pool(x, boundaries, mode=mode)
        torch.testing.assert_close(out, want)
        for got, wanted in zip(
            torch.autograd.grad(out.square().sum(), x),
            torch.autograd.grad(want.square().sum(), x),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


# ---- arguments --------------------------------------------------------------------------------

X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.int()}, "x: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
        ({"x": X[0]}, r"x: expected shape \(T, D\), got \(2,\)"),
        ({"x": X[:, :0]}, r"x: expected D >= 1, got \(4, 0\)"),
        ({"x": [[1.0]]}, "x: expected a Tensor, got list"),
        ({"cu_patchlens": ints(0, 4).long()}, "cu_patchlens: expected dtype int32, got int64"),
        ({"cu_patchlens": ints()}, "cu_patchlens: expected at least 1 entry"),
        ({"cu_patchlens": ints(0, 4)[None]}, r"cu_patchlens: expected shape \(n\+1,\)"),
        ({"cu_patchlens": ints(0, 4).to("meta")}, "cu_patchlens: expected device cpu, got meta"),
        ({"cu_patchlens": ints(1, 4)}, "cu_patchlens: expected first entry 0, got 1"),
        ({"cu_patchlens": ints(0, 3, 2, 4)}, "expected non-decreasing entries, got 2 after 3"),
        ({"cu_patchlens": ints(0, 5)}, "cu_patchlens: expected last entry <= 4, got 5"),
        ({"mode": "median"}, "mode: expected one of 'mean', 'sum', 'max', 'min', 'first', 'last'"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_pool(**{"x": X, "cu_patchlens": ints(0, 4), **arguments})


def test_a_refusal_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"tensors are on cpu .*; .*float64"):
        segment_pool(X.double(), ints(0, 4), impl="triton")
    assert any("on cpu" in reason for reason in explain(segment_pool, X, ints(0, 4)))
