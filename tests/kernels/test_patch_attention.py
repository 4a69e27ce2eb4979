"""patch_attention beyond what every op owes: isolation, long and many patches, layouts, errors."""

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

from stlm_kernels import _launch, explain, patch_attention
from stlm_kernels._torch.attention_blocks import length_of
from stlm_kernels.ops.patch_attention import config as configs
from stlm_kernels.ops.patch_attention import folded, torch_impl
from stlm_kernels.ops.patch_attention import reference as references
from stlm_kernels.ops.patch_attention.reference import reference

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
BOTH_MASKS = pytest.mark.parametrize("causal", [False, True])
NAMES = ("q", "k", "v")


def example(total: int, heads: int, kv_heads: int, width: int, way: Way, seed: int = 0) -> Any:
    """q, k, v as leaves."""
    shapes = [(total, n, width) for n in (heads, kv_heads, kv_heads)]
    return [x.requires_grad_() for x in normal(*shapes, way=way, seed=seed)]


def with_gradients(
    operands: list[Tensor],
    boundaries: Tensor,
    way: Way,
    upstream: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the result and the gradients of q, k and v by name."""
    named = dict(zip(NAMES, operands, strict=True))
    options |= {"impl": way.impl, "upstream": upstream}
    return tensors.with_gradients(patch_attention, named, boundaries.to(way.device), **options)


def assert_close_to_reference(
    operands: list[Tensor], boundaries: Tensor, way: Way, **options: Any
) -> dict[str, Tensor]:
    """Apply the tolerance rule to the result and all gradients."""
    upstream = random_upstream(operands[0].shape, operands[0])
    got = with_gradients(operands, boundaries, way, upstream, **options)
    named, options["upstream"] = dict(zip(NAMES, operands, strict=True)), upstream
    tensors.assert_close_to_reference(got, references, named, boundaries, **options)
    return got


# ---- isolation --------------------------------------------------------------------------------

BOUNDARIES = ints(0, 6, 6, 9, 16, 25, 40)


@EVERY_LANE
@pytest.mark.one_dtype
@BOTH_MASKS
@pytest.mark.parametrize(
    ("where", "poison"),
    [*((name, math.nan) for name in (*NAMES, "upstream")), ("v", math.inf), ("k", -math.inf)],
)
def test_nan_stays_in_its_own_patch(way: Way, where: str, poison: float, causal: bool) -> None:
    operands = [x.detach() for x in example(40, 2, 1, 16, way)]
    upstream = torch.randn(40, 2, 16).to(operands[0])
    clean = with_gradients(operands, BOUNDARIES, way, upstream, causal=causal)
    sick = dict(zip((*NAMES, "upstream"), [*operands, upstream], strict=True))
    sick[where] = sick[where].clone()
    sick[where][12, 0, 5] = poison  # in the patch of rows 9 to 15
    upstream = sick.pop("upstream")
    got = with_gradients(list(sick.values()), BOUNDARIES, way, upstream, causal=causal)
    others = [*range(9), *range(16, 40)]
    eps = torch.finfo(way.dtype).eps
    for name, x in got.items():
        torch.testing.assert_close(
            x[others], clean[name][others], rtol=8 * eps, atol=8 * eps, msg=f"{name} of {where}"
        )
    if where == "upstream":
        assert_same({"out": got["out"]}, {"out": clean["out"]})
        assert not got["v"][9:16, 0, 5].isfinite().all()
    elif where == "v" or math.isnan(poison):
        assert not got["out"][12, 0, 5].isfinite()
        for name in NAMES:  # the gradient of v does not depend on v
            assert not got[name][9:16].isfinite().all() or name == where == "v", name
    if causal:  # no earlier byte saw it
        assert got["out"][9:12].isfinite().all()


AMONG_SHORT = torch.tensor([0, 1, 40, 33, 32, 0, 12, 3, 3, 3, 3, 3, 3, 31, 34, 1]).cumsum(0).int()
"""Lengths around that of a tile, which short patches share and longer ones have to themselves."""


@EVERY_LANE
@pytest.mark.parametrize(("causal", "heads", "kv_heads"), [(True, 2, 1), (False, 3, 3)])
def test_long_patches_among_short_ones(
    way: Way, causal: bool, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of whole patches, and loops over the longer ones; the heads of a program at once."""
    monkeypatch.setattr(configs, "MANY", 0 if kv_heads == 3 else 10**9)
    total = int(AMONG_SHORT[-1])
    assert configs.is_short(total + 5, len(AMONG_SHORT) - 1, 16)
    operands = example(total + 5, heads, kv_heads, 16, way)
    assert_close_to_reference(operands, AMONG_SHORT, way, causal=causal)


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("where", [*NAMES, "upstream"])
def test_nan_stays_in_its_patch_among_long_and_short_ones(way: Way, where: str) -> None:
    total = int(AMONG_SHORT[-1])
    operands = [x.detach() for x in example(total, 2, 2, 16, way)]
    upstream = torch.randn(total, 2, 16).to(operands[0])
    clean = with_gradients(operands, AMONG_SHORT, way, upstream)
    sick = dict(zip((*NAMES, "upstream"), [*operands, upstream], strict=True))
    sick[where] = sick[where].clone()
    others = set(range(total))
    expected = {"upstream": "v", "q": "q", "k": "k", "v": "q"}[where]
    patches = (2, 6, 12)  # of 40, 12 and 3 rows
    for patch in patches:
        start, end = AMONG_SHORT[patch : patch + 2].tolist()
        sick[where][start + 1, 1, 5] = math.nan
        others -= set(range(start, end))
    upstream = sick.pop("upstream")
    got = with_gradients(list(sick.values()), AMONG_SHORT, way, upstream)
    eps, rest = torch.finfo(way.dtype).eps, sorted(others)
    for name, x in got.items():
        torch.testing.assert_close(
            x[rest], clean[name][rest], rtol=8 * eps, atol=8 * eps, msg=f"{name} of {where}"
        )
        torch.testing.assert_close(x[:, 0], clean[name][:, 0], rtol=8 * eps, atol=8 * eps)
    for patch in patches:
        own = slice(*AMONG_SHORT[patch : patch + 2].tolist())
        assert not got[expected][own, 1].isfinite().all()


@EVERY_LANE
@pytest.mark.one_dtype
@BOTH_MASKS
def test_rows_of_no_patch_are_never_read(way: Way, causal: bool) -> None:
    boundaries = ints(0, 10, 10, 25)
    operands = [x.detach() for x in example(70, 2, 2, 16, way)]
    upstream = torch.randn(70, 2, 16).to(operands[0])
    clean = with_gradients(operands, boundaries, way, upstream, causal=causal)
    for x in (*operands, upstream):
        x[25:] = math.nan
    got = with_gradients(operands, boundaries, way, upstream, causal=causal)
    eps = torch.finfo(way.dtype).eps
    for name, x in got.items():
        torch.testing.assert_close(x, clean[name], rtol=8 * eps, atol=8 * eps)
        assert (x[25:] == 0).all(), name


@EVERY_LANE
@BOTH_MASKS
def test_a_patch_alone_and_among_others(way: Way, causal: bool) -> None:
    operands = example(40, 2, 1, 16, way)
    upstream = torch.randn(40, 2, 16).to(operands[0])
    together = with_gradients(operands, BOUNDARIES, way, upstream, causal=causal)
    part = [x[16:25] for x in operands]
    alone = with_gradients(part, ints(0, 9), way, upstream[16:25], causal=causal)
    eps = torch.finfo(way.dtype).eps
    for name, x in alone.items():
        torch.testing.assert_close(x, together[name][16:25], rtol=16 * eps, atol=16 * eps)


@EVERY_LANE
def test_causal_sees_no_later_byte(way: Way) -> None:
    operands = [x.detach() for x in example(50, 1, 1, 16, way)]
    boundaries = ints(0, 45, 50).to(way.device)
    before = patch_attention(*operands, boundaries, causal=True, impl=way.impl)
    for x in operands:
        x[30:] += 1
    after = patch_attention(*operands, boundaries, causal=True, impl=way.impl)
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(before[:30], after[:30], rtol=8 * eps, atol=8 * eps)
    assert (before[30:45] != after[30:45]).any()


# ---- values -----------------------------------------------------------------------------------


@EVERY_LANE
@BOTH_MASKS
def test_a_byte_alone_in_its_patch_is_its_value(way: Way, causal: bool) -> None:
    operands = example(5, 2, 1, 16, way)
    got = with_gradients(operands, ints(0, 1, 2, 3, 4, 5), way, causal=causal)
    assert torch.equal(got["out"], operands[2].detach().expand(5, 2, 16))
    eps = torch.finfo(way.dtype).eps  # what is left of two equal sums
    for name in ("q", "k"):
        assert float(got[name].abs().max()) <= 64 * eps


@EVERY_LANE
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(way: Way, sign: int) -> None:
    """exp of a score of 400 is not a float32; the largest score is taken off first."""
    operands = [x.detach() for x in example(40, 1, 1, 16, way)]
    operands[0][:], operands[1][:] = 10, sign * 10
    operands[1][3] *= 1.0625
    got = with_gradients(operands, ints(0, 25, 40), way)
    want = reference(*[x.cpu().double() for x in operands], ints(0, 25, 40))
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(got["out"].cpu().double(), want, rtol=400 * eps, atol=4 * eps)
    assert all(x.isfinite().all() for x in got.values())


@EVERY_LANE
def test_equal_scores_give_the_mean(way: Way) -> None:
    q, k, v = example(80, 1, 1, 16, way)
    boundaries = ints(0, 80).to(way.device)
    out = patch_attention(q, k, v, boundaries, scale=0.0, impl=way.impl)
    mean = v.detach().double().mean(0).expand(80, 1, 16).to(out.dtype)
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(out.detach(), mean, rtol=4 * eps, atol=eps)


@EVERY_LANE
@BOTH_MASKS
def test_a_negative_scale_turns_the_scores_around(way: Way, causal: bool) -> None:
    """Plain SDPA on a CPU gives NaN there: its mask changes sign as well."""
    q, k, v = (x.detach() for x in example(30, 1, 1, 16, way))
    boundaries = ints(0, 12, 30)
    want = with_gradients([-q, k, v], boundaries, way, scale=0.5, causal=causal)
    got = with_gradients([q, k, v], boundaries, way, scale=-0.5, causal=causal)
    want["q"] = -want["q"]
    eps = torch.finfo(way.dtype).eps
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=8 * eps, atol=8 * eps)


@EVERY_LANE
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3)])
def test_query_heads_share_key_heads_in_order(way: Way, heads: int, kv_heads: int) -> None:
    operands = example(30, heads, kv_heads, 16, way)
    got = assert_close_to_reference(operands, ints(0, 12, 30), way)
    q, k, v = (x.detach() for x in operands)
    group, boundaries = heads // kv_heads, ints(0, 12, 30).to(way.device)
    eps = torch.finfo(way.dtype).eps
    for head in range(heads):
        shared = slice(head // group, head // group + 1)
        one = patch_attention(
            q[:, head : head + 1], k[:, shared], v[:, shared], boundaries, impl=way.impl
        )
        torch.testing.assert_close(one[:, 0], got["out"][:, head], rtol=16 * eps, atol=16 * eps)


@EVERY_LANE
@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 9) | st.integers(30, 70), max_size=4),
    tail=st.integers(0, 9),
    causal=st.booleans(),
    kv_heads=st.integers(1, 2),
)
def test_ragged_patches(
    way: Way, lengths: list[int], tail: int, causal: bool, kv_heads: int
) -> None:
    # The gradient of q in a patch of one byte is zero: the rest gives the errors their scale.
    boundaries = torch.tensor([0, *lengths, 12]).cumsum(0).int()
    operands = example(int(boundaries[-1]) + tail, 2, kv_heads, 16, way)
    assert_close_to_reference(operands, boundaries, way, causal=causal)


@pytest.mark.lanes("cpu", "gpu")
@pytest.mark.parametrize("budget", [1, 40, 1000])
@BOTH_MASKS
def test_blocks_of_any_size(
    way: Way, budget: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long patches in blocks of queries: the torch path's way to bounded memory."""
    if way.impl != "torch":
        pytest.skip("the kernels have no such blocks")
    monkeypatch.setattr(torch_impl, "_folds", lambda *_: False)
    monkeypatch.setattr(torch_impl, "BLOCK_SCORES", budget)
    monkeypatch.setattr(torch_impl, "LEAST_ROWS", 3)
    operands = example(90, 2, 1, 16, way)
    assert_close_to_reference(operands, ints(0, 3, 4, 4, 41, 44, 80), way, causal=causal)


@BOTH_MASKS
def test_the_blocks_of_a_long_patch_stay_small(causal: bool) -> None:
    total, heads = 65_536, 2
    covered = 0
    for block in torch_impl._ragged_blocks(ints(0, total), total, heads, causal, False):
        assert isinstance(block.rows, slice)
        rows, keys = length_of(block.rows), length_of(block.keys)
        assert block.rows.start == covered
        assert heads * rows * keys <= 2 * torch_impl.BLOCK_SCORES
        covered += rows
    assert covered == total


@pytest.mark.parametrize("boundaries", [(0, 6, 12, 18), (0, 4, 4, 8, 13, 18)], ids=str)
def test_patches_of_one_length_behind_each_other_are_not_gathered(
    boundaries: tuple[int, ...],
) -> None:
    seen = [False] * 18
    for rows, length in folded.folds_of(ints(*boundaries)):
        assert isinstance(rows, slice)
        assert (rows.stop - rows.start) % length == 0
        for t in range(rows.start, rows.stop):
            assert not seen[t]
            seen[t] = True
    assert all(seen)
    way = Way("torch", "cpu", torch.float32)
    assert_close_to_reference(example(20, 2, 1, 16, way), ints(*boundaries), way)


@pytest.mark.lanes("cpu", "gpu")
def test_far_more_patches_than_a_grid_has_rows(way: Way) -> None:
    """65,535 is where the second dimension of a CUDA grid stops."""
    total = 140_000
    q, k, v = example(total, 1, 1, 16, way)
    boundaries = torch.arange(0, total + 1, 2, dtype=torch.int32)
    got = with_gradients([q, k, v], boundaries, way)
    pairs = [x.detach().view(-1, 2, 16).double() for x in (q, k, v)]
    weights = (pairs[0] @ pairs[1].transpose(1, 2) / 4).softmax(2)
    want = (weights @ pairs[2]).view(total, 1, 16).to(way.dtype)
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(got["out"], want, rtol=8 * eps, atol=8 * eps)
    assert all(x.isfinite().all() for x in got.values())


# ---- layouts, unread boundaries ---------------------------------------------------------------


@EVERY_LANE
def test_packed_and_expanded_operands(way: Way) -> None:
    rng = torch.Generator().manual_seed(0)
    packed = torch.randn(60, 3, 2, 16, generator=rng).to(way.device, way.dtype)
    boundaries = ints(0, 7, 30, 60)
    slices = list(packed.unbind(1))
    assert not slices[0].is_contiguous()
    plain = with_gradients([x.contiguous() for x in slices], boundaries, way)
    eps = torch.finfo(way.dtype).eps
    for name, x in with_gradients(slices, boundaries, way).items():
        torch.testing.assert_close(x, plain[name], rtol=8 * eps, atol=8 * eps)
    one = [x[:1].expand(60, 2, 16) for x in slices]
    same = with_gradients([x.contiguous() for x in one], boundaries, way)
    for name, x in with_gradients(one, boundaries, way).items():
        torch.testing.assert_close(x, same[name], rtol=8 * eps, atol=8 * eps)


@EVERY_LANE
@BOTH_MASKS
@pytest.mark.parametrize(
    ("boundaries", "meaning"),
    [((0, 25, 13, 39), (0, 25, 25, 36)), ((-4, 12, 99), (0, 12, 36)), ((0, 10, 30), (0, 10, 30))],
)
def test_unread_boundaries_stay_in_bounds(
    way: Way, causal: bool, boundaries: tuple[int, ...], meaning: tuple[int, ...]
) -> None:
    """Unread offsets are clamped, and the torch path is of static shape."""
    if way.dtype != torch.float32:
        pytest.skip("one dtype shows where the boundaries go")
    if way.impl == "triton" and boundaries[1] > boundaries[2]:
        pytest.skip("which patch a row of overlapping ranges is in is the kernels' own choice")
    operands = [x.detach() for x in example(36, 2, 1, 16, way)]

    def loss(q: Tensor) -> tuple[Tensor, Tensor]:
        offsets = ints(*boundaries).to(way.device)
        out = patch_attention(q, *operands[1:], offsets, causal=causal, impl=way.impl)
        return out.square().sum(), out

    gradient, out = torch.func.grad(loss, has_aux=True)(operands[0])
    wide = [x.cpu().double().requires_grad_() for x in operands]
    want = reference(*wide, ints(*meaning), causal=causal)
    (wanted,) = torch.autograd.grad(want.square().sum(), wide[0])
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


@BOTH_MASKS
def test_nan_stays_in_its_patch_where_boundaries_are_not_read(causal: bool) -> None:
    way = Way("torch", "cpu", torch.float32)
    operands = [x.detach() for x in example(40, 2, 1, 16, way)]
    clean = with_gradients(operands, BOUNDARIES, way, causal=causal)
    operands[2][12, 0, 5] = operands[1][10, 0, 2] = math.nan
    leaves = [x.requires_grad_() for x in operands]
    torch._dynamo.reset()
    compiled = torch.compile(patch_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves, BOUNDARIES, causal=causal)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    upstream[2] = math.nan
    grads = torch.autograd.grad(out, leaves, upstream)
    others = [*range(6, 9), *range(16, 40)]
    for name, x in {"out": out, **dict(zip(NAMES, grads, strict=True))}.items():
        torch.testing.assert_close(x[others], clean[name][others], rtol=1e-5, atol=1e-5, msg=name)


@BOTH_MASKS
def test_derivatives(causal: bool) -> None:
    way = Way("torch", "cpu", torch.float64)
    operands = example(9, 2, 1, 3, way)
    boundaries = ints(0, 1, 1, 4, 8)

    def attend(*operands: Tensor) -> Tensor:
        return patch_attention(*operands, boundaries, causal=causal)

    assert torch.autograd.gradcheck(attend, operands)
    assert torch.autograd.gradgradcheck(attend, operands, atol=1e-4)


# ---- arguments --------------------------------------------------------------------------------

Q, KV = torch.zeros(6, 4, 16), torch.zeros(6, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q.int()}, "q: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
        ({"q": Q[0]}, r"q: expected shape \(T, H, K\), got \(4, 16\)"),
        ({"q": Q[:, :0]}, r"q: expected H >= 1 and K >= 1, got \(6, 0, 16\)"),
        ({"q": Q[..., :0]}, r"q: expected H >= 1 and K >= 1, got \(6, 4, 0\)"),
        ({"k": KV[:5]}, r"k: expected shape \(6, H_kv, 16\), got \(5, 2, 16\)"),
        ({"k": KV.half()}, "k: expected dtype float32, got float16"),
        ({"k": KV.to("meta")}, "k: expected device cpu, got meta"),
        ({"k": torch.zeros(6, 3, 16)}, "k: expected heads that divide the 4 of q, got 3"),
        ({"k": KV[:, :0]}, "k: expected heads that divide the 4 of q, got 0"),
        ({"v": KV[:, :1]}, r"v: expected shape \(6, 2, 16\), got \(6, 1, 16\)"),
        ({"v": [1.0]}, "v: expected a Tensor, got list"),
        ({"cu_patchlens": ints(0, 6).long()}, "cu_patchlens: expected dtype int32, got int64"),
        ({"cu_patchlens": ints(1, 6)}, "cu_patchlens: expected first entry 0, got 1"),
        ({"cu_patchlens": ints(0, 4, 2)}, "expected non-decreasing entries, got 2 after 4"),
        ({"cu_patchlens": ints(0, 7)}, "cu_patchlens: expected last entry <= 6, got 7"),
        ({"causal": 1}, "causal: expected a bool, got 1"),
        ({"scale": math.inf}, "scale: expected None or a finite number, got inf"),
        ({"scale": "half"}, "scale: expected None or a finite number, got 'half'"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_attention(**{"q": Q, "k": KV, "v": KV, "cu_patchlens": ints(0, 6), **arguments})


@pytest.mark.parametrize("width", [8, 20, 136])
def test_a_refusal_lists_every_reason(width: int) -> None:
    x = torch.zeros(6, 4, width, dtype=torch.float64)
    message = rf"tensors are on cpu .*; q is torch.float64; .*heads are {width} wide"
    with pytest.raises(NotImplementedError, match=message):
        patch_attention(x, x, x, ints(0, 6), impl="triton")
    assert any("heads are" in reason for reason in explain(patch_attention, x, x, x, ints(0, 6)))
    odd = torch.zeros(6, 3, 16)
    assert any("evenly" in reason for reason in explain(patch_attention, Q, odd, odd, ints(0, 6)))


@pytest.mark.parametrize(
    ("patches", "width", "kernels"),
    [
        (64, 16, ["short_fwd", "short_bwd"]),
        (63, 16, ["fwd", "bwd_q", "bwd_kv"]),
        (64, 72, ["fwd", "bwd_q", "bwd_kv"]),
    ],
)
def test_short_patches_take_one_launch_each_way(
    patches: int, width: int, kernels: list[str]
) -> None:
    """16 rows a patch on average, or more; heads that are not too wide."""
    triton_impl = pytest.importorskip("stlm_kernels.ops.patch_attention.triton_impl")
    names: list[str] = []
    q = torch.zeros(1024, 2, width, dtype=torch.bfloat16)
    boundaries = torch.linspace(0, 1024, patches + 1).to(torch.int32)
    with _launch.recording(lambda *call: names.append(call[0].__name__)):
        out, lse = triton_impl.launch_fwd(q, q, q, boundaries, False, 1.0, q.dtype)
        triton_impl.launch_bwd(out, q, q, q, out, lse, boundaries, False, 1.0)
    launched = [name for name in names if name != "stlm_row_bounds"]
    assert launched == [f"stlm_patch_attention_{name}" for name in kernels]
    assert len(names) == 2 or "fwd" in kernels
