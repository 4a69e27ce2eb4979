"""attention_pool beyond what every op owes: isolation, long and many patches, layouts, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import tensors
from helpers.lanes import Way
from helpers.ops import assert_same
from helpers.tensors import ints, normal, random_upstream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stlm_kernels import _launch, attention_pool, explain
from stlm_kernels.ops.attention_pool import reference as references
from stlm_kernels.ops.attention_pool.reference import reference
from stlm_kernels.testing import poisoned_memory

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
NAMES = ("query", "key", "value")
BOUNDARIES = (0, 6, 6, 9, 16, 25, 37)
OTHERS = [*range(9), *range(16, 37)]
SICK = 3
"""The patch of rows 9 to 15 in BOUNDARIES."""


def example(
    total: int, heads: int, kv_heads: int, width: int, way: Way, patches: int | None = None
) -> list[Tensor]:
    """query, key, value; a query of each patch where their number is given."""
    query = (heads, width) if patches is None else (patches, heads, width)
    return normal(query, (total, kv_heads, width), (total, kv_heads, width), way=way)


def with_gradients(
    operands: list[Tensor],
    boundaries: Tensor,
    way: Way,
    upstream: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the result and the gradients of query, key and value by name."""
    named = dict(zip(NAMES, operands, strict=True))
    options |= {"impl": way.impl, "upstream": upstream}
    with poisoned_memory():
        return tensors.with_gradients(attention_pool, named, boundaries.to(way.device), **options)


def assert_close_to_reference(
    operands: list[Tensor], boundaries: Tensor, way: Way, **options: Any
) -> dict[str, Tensor]:
    """Apply the tolerance rule to the result and all gradients."""
    got = with_gradients(operands, boundaries, way, **options)
    options["upstream"] = random_upstream(got["out"].shape, got["out"])
    named = dict(zip(NAMES, operands, strict=True))
    tensors.assert_close_to_reference(got, references, named, boundaries, **options)
    return got


def assert_near(got: Tensor, want: Tensor, ulps: int = 16, **options: Any) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want.to(got), rtol=ulps * eps, atol=ulps * eps, **options)


# ---- isolation --------------------------------------------------------------------------------


@EVERY_LANE
@pytest.mark.parametrize(
    ("where", "poison"),
    [("key", math.nan), ("value", math.inf), ("query", math.nan), ("upstream", math.nan)],
)
def test_nan_stays_in_its_own_patch(way: Way, where: str, poison: float) -> None:
    operands = example(37, 2, 1, 16, way, patches=6)
    upstream = random_upstream((6, 2, 16), operands[0])
    clean = with_gradients(operands, ints(*BOUNDARIES), way, upstream)
    sick = dict(zip((*NAMES, "upstream"), [x.clone() for x in (*operands, upstream)], strict=True))
    sick[where][SICK if where in ("query", "upstream") else 12, 0, 5] = poison
    upstream = sick.pop("upstream")
    got = with_gradients(list(sick.values()), ints(*BOUNDARIES), way, upstream)
    for name, x in got.items():
        healthy = OTHERS if name in ("key", "value") else [0, 1, 2, 4, 5]
        assert_near(x[healthy], clean[name][healthy], msg=f"{name} of {where}")
    if where == "upstream":
        assert_same({"out": got["out"]}, {"out": clean["out"]})
    else:
        assert not got["out"][SICK].isfinite().all()
        assert not got["query"][SICK].isfinite().all()
    assert not got["key"][9:16].isfinite().all()


@EVERY_LANE
@pytest.mark.parametrize("own", [False, True])
def test_rows_of_no_patch_are_never_read(way: Way, own: bool) -> None:
    boundaries = ints(0, 10, 10, 25)
    operands = example(60, 2, 2, 16, way, patches=3 if own else None)
    clean = with_gradients(operands, boundaries, way)
    assert (clean["out"][1] == 0).all()
    for x in operands[1:]:
        x[25:] = math.nan
    got = with_gradients(operands, boundaries, way)
    for name, x in got.items():
        assert_near(x, clean[name])
    for name in ("key", "value"):
        assert (got[name][25:] == 0).all(), name
    if own:
        assert (got["query"][1] == 0).all()


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("own", [False, True])
def test_nan_upstream_at_an_empty_patch_reaches_nothing(way: Way, own: bool) -> None:
    operands = example(12, 2, 1, 8, way, patches=3 if own else None)
    upstream = random_upstream((3, 2, 8), operands[0])
    clean = with_gradients(operands, ints(0, 5, 5, 12), way, upstream)
    upstream[1] = math.nan
    assert_same(with_gradients(operands, ints(0, 5, 5, 12), way, upstream), clean)


@EVERY_LANE
def test_a_patch_alone_and_among_others(way: Way) -> None:
    operands = example(37, 2, 1, 16, way)
    upstream = random_upstream((6, 2, 16), operands[0])
    together = with_gradients(operands, ints(*BOUNDARIES), way, upstream)
    part = [operands[0], *(x[16:25] for x in operands[1:])]
    alone = with_gradients(part, ints(0, 9), way, upstream[4:5])
    assert_near(alone["out"], together["out"][4:5])
    for name in ("key", "value"):
        assert_near(alone[name], together[name][16:25])


# ---- values -----------------------------------------------------------------------------------


@EVERY_LANE
def test_a_byte_alone_in_its_patch_is_its_value(way: Way) -> None:
    operands = example(5, 2, 1, 16, way)
    got = with_gradients(operands, ints(0, 1, 2, 3, 4, 5), way)
    assert torch.equal(got["out"], operands[2].expand(5, 2, 16))
    eps = torch.finfo(way.dtype).eps  # what is left of two equal sums
    for name in ("query", "key"):
        assert float(got[name].abs().max()) <= 64 * eps


@EVERY_LANE
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(way: Way, sign: int) -> None:
    """exp of a score of 400 is not a float32; the largest score is taken off first."""
    operands = example(40, 1, 1, 16, way)
    operands[0][:], operands[1][:] = 10, sign * 10
    operands[1][3] *= 1.0625
    got = with_gradients(operands, ints(0, 25, 40), way)
    want = reference(*[x.cpu().double() for x in operands], ints(0, 25, 40))
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(got["out"].cpu().double(), want, rtol=400 * eps, atol=4 * eps)
    assert all(x.isfinite().all() for x in got.values())


@EVERY_LANE
def test_equal_scores_give_the_mean(way: Way) -> None:
    query, key, value = example(40, 1, 1, 16, way)
    boundaries = ints(0, 40).to(way.device)
    out = attention_pool(query, key, value, boundaries, scale=0.0, impl=way.impl)
    assert_near(out, value.double().mean(0, keepdim=True), ulps=4)


@EVERY_LANE
@pytest.mark.parametrize("width", [8, 24])
def test_query_heads_share_key_heads_in_order(way: Way, width: int) -> None:
    query, key, value = example(30, 6, 2, width, way)
    boundaries = ints(0, 12, 30).to(way.device)
    together = attention_pool(query, key, value, boundaries, impl=way.impl)
    for head in range(6):
        shared = slice(head // 3, head // 3 + 1)
        one = attention_pool(
            query[head : head + 1], key[:, shared], value[:, shared], boundaries, impl=way.impl
        )
        assert_near(one[:, 0], together[:, head])


@EVERY_LANE
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 9) | st.integers(30, 50), max_size=4),
    tail=st.integers(0, 9),
    own=st.booleans(),
    kv_heads=st.integers(1, 2),
)
def test_ragged_patches(way: Way, lengths: list[int], tail: int, own: bool, kv_heads: int) -> None:
    # The gradient of key in a patch of one byte is zero: the rest gives the errors their scale.
    boundaries = torch.tensor([0, *lengths, 12]).cumsum(0).int()
    patches = len(lengths) + 1 if own else None
    operands = example(int(boundaries[-1]) + tail, 2, kv_heads, 16, way, patches)
    assert_close_to_reference(operands, boundaries, way)


@EVERY_LANE
def test_a_shared_query_is_every_patchs_own(way: Way) -> None:
    shared = example(37, 4, 2, 16, way)
    own = [shared[0].expand(6, 4, 16), *shared[1:]]
    a, b = (with_gradients(operands, ints(*BOUNDARIES), way) for operands in (shared, own))
    for name in ("out", "key", "value"):
        assert_near(a[name], b[name])
    total = b["query"].double().sum(0)
    eps = torch.finfo(way.dtype).eps  # of the six terms, each rounded
    torch.testing.assert_close(a["query"].double(), total, rtol=8 * eps, atol=8 * eps)


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.parametrize("programs", [3, 7])
def test_runs_of_patches_add_up(way: Way, programs: int) -> None:
    """A shared query's gradient from few runs, and from so many that they are added in two steps,
    some of them without a patch."""
    if way.impl != "triton":
        pytest.skip("the torch path has no runs")
    config = {"ROWS": 4, "BLOCK_H": 1, "PROGRAMS": programs, "FOLD": 4, "num_warps": 1}
    boundaries = torch.arange(0, 31, 2, dtype=torch.int32)
    with _launch.overriding({"attention_pool_bwd": config}):
        assert_close_to_reference(example(33, 1, 1, 8, way), boundaries, way)


@pytest.mark.lanes("cpu", "gpu")
def test_far_more_patches_than_a_grid_has_rows(way: Way) -> None:
    """65,535 is where the second dimension of a CUDA grid stops."""
    total = 140_000
    query, key, value = example(total, 1, 1, 8, way)
    boundaries = torch.arange(0, total + 1, 2, dtype=torch.int32)
    got = with_gradients([query, key, value], boundaries, way)
    pairs = [x.view(-1, 2, 8).double() for x in (key, value)]
    weights = (pairs[0] @ query[0].double() * 8**-0.5).softmax(1)
    assert_near(got["out"], (weights[..., None] * pairs[1]).sum(1)[:, None], ulps=8)
    assert all(x.isfinite().all() for x in got.values())


class Sizes(TorchDispatchMode):
    """The most elements that any op returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_one_long_patch_among_short_ones_costs_its_bytes() -> None:
    way = Way("torch", "cpu", torch.float32)
    boundaries = torch.cat([torch.arange(2000), ints(6000)]).int()
    operands = example(6000, 2, 2, 8, way, patches=2000)
    with Sizes() as sizes:
        with_gradients(operands, boundaries, way)
    assert sizes.largest <= 6000 * 2 * 8


# ---- layouts, dtypes, unread boundaries ----------------------------------------------------------


@EVERY_LANE
def test_packed_and_expanded_operands(way: Way) -> None:
    rng = torch.Generator().manual_seed(0)
    packed = torch.randn(40, 2, 2, 16, generator=rng).to(way.device, way.dtype)
    query, boundaries = example(0, 2, 2, 16, way)[0], ints(0, 7, 30, 38)
    slices = list(packed.unbind(1))
    assert not slices[0].is_contiguous()
    expanded = [x[:1].expand(40, 2, 16) for x in slices]
    for operands in (slices, expanded):
        plain = with_gradients([query, *(x.contiguous() for x in operands)], boundaries, way)
        for name, x in with_gradients([query, *operands], boundaries, way).items():
            assert_near(x, plain[name])


@EVERY_LANE
def test_a_float32_query_beside_16_bit_keys(way: Way) -> None:
    if way.dtype not in (torch.float16, torch.bfloat16):
        pytest.skip("about 16-bit keys")
    operands = example(37, 2, 1, 16, way)
    narrow = with_gradients(operands, ints(*BOUNDARIES), way)
    finer = operands[0].float() * (1 + torch.finfo(way.dtype).eps / 8)
    wide = with_gradients([finer, *operands[1:]], ints(*BOUNDARIES), way)
    assert wide["query"].dtype == torch.float32
    for name in ("out", "key", "value"):
        assert torch.equal(narrow[name], wide[name])
    assert torch.equal(narrow["query"], wide["query"].to(way.dtype))
    with pytest.raises(ValueError, match="query: expected dtype"):
        with_gradients([finer.expand(6, 2, 16), *operands[1:]], ints(*BOUNDARIES), way)


@EVERY_LANE
@pytest.mark.parametrize(
    ("boundaries", "meaning"),
    [((0, 25, 13, 30), (0, 25, 25, 30)), ((-4, 12, 99), (0, 12, 36)), ((0, 10, 30), (0, 10, 30))],
)
@pytest.mark.parametrize("own", [False, True])
def test_unread_boundaries_stay_in_bounds(
    way: Way, own: bool, boundaries: tuple[int, ...], meaning: tuple[int, ...]
) -> None:
    """Unread offsets are clamped."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows where the boundaries go")
    if way.impl == "triton" and boundaries[1] > boundaries[2]:
        pytest.skip("which patch a row of overlapping ranges is in is the kernels' own choice")
    operands = example(36, 2, 1, 16, way, patches=len(boundaries) - 1 if own else None)

    def loss(key: Tensor) -> tuple[Tensor, Tensor]:
        offsets = ints(*boundaries).to(way.device)
        out = attention_pool(operands[0], key, operands[2], offsets, impl=way.impl)
        return out.square().sum(), out

    with poisoned_memory():
        gradient, out = torch.func.grad(loss, has_aux=True)(operands[1])
    wide = [x.cpu().double().requires_grad_() for x in operands]
    want = reference(*wide, ints(*meaning))
    (wanted,) = torch.autograd.grad(want.square().sum(), wide[1])
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


@EVERY_LANE
def test_unread_rows_before_the_first_boundary_get_no_gradient(way: Way) -> None:
    query, key, value = example(9, 1, 1, 8, way)
    boundaries, outside = ints(4, 7).to(way.device), [0, 1, 2, 3, 7, 8]
    key[outside] = value[outside] = math.nan

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return attention_pool(query, key, value, boundaries, impl=way.impl).sum()

    with poisoned_memory():
        of_query, of_key = torch.func.grad(loss, argnums=(0, 1))(query, key)
    assert (of_key[4:7] != 0).all()
    assert (of_key[outside] == 0).all()
    assert of_query.isfinite().all()


def test_nan_stays_in_its_patch_where_boundaries_are_not_read() -> None:
    way = Way("torch", "cpu", torch.float32)
    operands = example(37, 2, 1, 16, way)
    boundaries = ints(*BOUNDARIES[:-1], 30)
    clean = with_gradients(operands, boundaries, way)
    for x in operands[1:]:
        x[12, 0, 5] = x[30:] = math.nan
    leaves = [x.requires_grad_() for x in operands]
    torch._dynamo.reset()
    out = torch.compile(attention_pool, fullgraph=True, backend="aot_eager")(*leaves, boundaries)
    grads = torch.autograd.grad(out, leaves, random_upstream(out.shape, out))
    for name, x in zip(NAMES[1:], grads[1:], strict=True):
        torch.testing.assert_close(x[OTHERS], clean[name][OTHERS], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[[0, 1, 2, 4, 5]], clean["out"][[0, 1, 2, 4, 5]])


def test_derivatives_of_a_query_for_each_patch() -> None:
    way = Way("torch", "cpu", torch.float64)
    operands = [x.requires_grad_() for x in example(9, 2, 1, 3, way, patches=4)]

    def pool(*operands: Tensor) -> Tensor:
        return attention_pool(*operands, ints(0, 1, 1, 4, 8))

    assert torch.autograd.gradcheck(pool, operands)
    assert torch.autograd.gradgradcheck(pool, operands, atol=1e-4)


# ---- arguments --------------------------------------------------------------------------------

Q, KV = torch.zeros(4, 16), torch.zeros(6, 2, 16)
FLOATS = "float32 or bfloat16 or float16 or float64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": KV.int()}, f"key: expected dtype {FLOATS}, got int32"),
        ({"key": KV[0]}, r"key: expected shape \(T, H_kv, K\), got \(2, 16\)"),
        ({"key": KV[:, :0]}, r"key: expected H_kv >= 1 and K >= 1, got \(6, 0, 16\)"),
        ({"value": KV[:5]}, r"value: expected shape \(6, 2, 16\), got \(5, 2, 16\)"),
        ({"value": KV.half()}, "value: expected dtype float32, got float16"),
        ({"value": KV.to("meta")}, "value: expected device cpu, got meta"),
        ({"query": [1.0]}, "query: expected a Tensor, got list"),
        ({"query": Q[0]}, r"query: expected shape \(H, 16\) or \(1, H, 16\), got \(16,\)"),
        ({"query": Q[:, :8]}, r"query: expected shape \(H, 16\), got \(4, 8\)"),
        ({"query": Q.expand(2, 4, 16)}, r"query: expected shape \(1, H, 16\), got \(2, 4, 16\)"),
        ({"query": Q[:3]}, "query: expected a multiple of key's 2 heads, got 3"),
        ({"query": Q[:0]}, "query: expected a multiple of key's 2 heads, got 0"),
        ({"query": Q.half()}, "query: expected dtype float32, got float16"),
        ({"cu_patchlens": ints(0, 6).long()}, "cu_patchlens: expected dtype int32, got int64"),
        ({"cu_patchlens": ints(1, 6)}, "cu_patchlens: expected first entry 0, got 1"),
        ({"cu_patchlens": ints(0, 4, 2)}, "expected non-decreasing entries, got 2 after 4"),
        ({"cu_patchlens": ints(0, 7)}, "cu_patchlens: expected last entry <= 6, got 7"),
        ({"scale": math.inf}, "scale: expected None or a finite number, got inf"),
        ({"scale": "half"}, "scale: expected None or a finite number, got 'half'"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_pool(
            **{"query": Q, "key": KV, "value": KV, "cu_patchlens": ints(0, 6), **arguments}
        )


@pytest.mark.parametrize("width", [4, 20, 136])
def test_a_refusal_lists_every_reason(width: int) -> None:
    x = torch.zeros(6, 1, width, dtype=torch.float64)
    message = rf"tensors are on cpu .*; key is torch.float64; .*heads are {width} wide"
    with pytest.raises(NotImplementedError, match=message):
        attention_pool(x[0], x, x, ints(0, 6), impl="triton")
    assert any("heads are" in reason for reason in explain(attention_pool, x[0], x, x, ints(0, 6)))
    many, one = torch.zeros(64, 128), torch.zeros(6, 1, 128)
    assert any(
        "share a key" in reason for reason in explain(attention_pool, many, one, one, ints(0))
    )
