"""attention with more keys than queries, whose rows are the last ones, and windows of two sides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.attention import NAMES, assert_close, assert_close_to_reference, with_gradients
from helpers.lanes import Way
from helpers.tensors import ints, normal
from torch import Tensor

from stlm_kernels import _launch, attention, explain

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
ONE_DTYPE = pytest.mark.one_dtype  # test_ops has the values of the others
ROWS, KEYS = ints(0, 3, 3, 20, 31), ints(0, 9, 13, 60, 71)
CHOICES: list[dict[str, Any]] = [
    {},
    {"window": 12},
    {"causal": False, "window": (7, 4)},
    {"causal": False, "window": (-1, 4)},
    {"causal": False, "window": (7, None)},
]


def example(way: Way, rows: int = 35, keys: int = 80, heads: int = 2) -> list[Tensor]:
    return normal((rows, heads, 16), (keys, 1, 16), (keys, 1, 16), way=way)


def packed(way: Way) -> dict[str, Any]:
    return {"cu_seqlens": ROWS.to(way.device), "cu_seqlens_k": KEYS.to(way.device)}


@EVERY_LANE
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_documents_with_more_keys(way: Way, options: dict[str, Any]) -> None:
    """One without rows, one as long as its keys, rows and keys of none at the end."""
    documents: dict[str, Any] = {"cu_seqlens": ROWS, "cu_seqlens_k": KEYS}
    got = assert_close_to_reference(example(way), way, **documents, **options)
    assert (got["out"][31:] == 0).all()
    assert (got["k"][71:] == 0).all()
    assert (got["k"][9:13] == 0).all()  # the document without rows


@EVERY_LANE
@ONE_DTYPE
@pytest.mark.parametrize("options", CHOICES[:4], ids=str)
@pytest.mark.parametrize("rows", [1, 35, 70])
def test_the_last_rows_of_a_sequence(way: Way, rows: int, options: dict[str, Any]) -> None:
    """Last rows give what they give among all: a prompt in chunks, new positions with a cache."""
    q, k, v = example(way, 70, 70)
    upstream = torch.randn(70, 2, 16).to(q)
    upstream[: 70 - rows] = 0
    whole = with_gradients([q, k, v], way, upstream, **options)
    part = with_gradients([q[70 - rows :], k, v], way, upstream[70 - rows :], **options)
    for name in ("out", "q"):
        assert_close(part[name], whole[name][70 - rows :], way)
    for name in ("k", "v"):
        assert_close(part[name], whole[name], way)


@EVERY_LANE
def test_a_batch_is_documents_of_one_length(way: Way) -> None:
    q, k, v = example(way, 3 * 21, 3 * 40)
    batch = [q.view(3, 21, 2, 16), *(x.view(3, 40, 1, 16) for x in (k, v))]
    upstream = torch.randn(3, 21, 2, 16).to(q)
    boundaries: dict[str, Any] = {
        "cu_seqlens": ints(0, 21, 42, 63),
        "cu_seqlens_k": ints(0, 40, 80, 120),
    }
    boundaries = {name: x.to(way.device) for name, x in boundaries.items()}
    dense = with_gradients(batch, way, upstream, window=30)
    flat = with_gradients([q, k, v], way, upstream.flatten(0, 1), window=30, **boundaries)
    for name, x in dense.items():
        assert_close(x.flatten(0, 1), flat[name], way)


@EVERY_LANE
@ONE_DTYPE
@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"window": (11, 5)}, {"window": 12}),  # causal: nothing behind, as in flash-attention
        ({"window": (-1, -1)}, {}),
        ({"window": (None, 0)}, {}),
        ({"causal": False, "window": (11, 0)}, {"window": 12}),
        ({"causal": False, "window": (-1, 0)}, {}),
        ({"causal": False, "window": (500, 3)}, {"causal": False, "window": (-1, 3)}),
    ],
    ids=str,
)
def test_windows_that_are_others(way: Way, given: dict[str, Any], same: dict[str, Any]) -> None:
    operands = example(way)
    want = with_gradients(operands, way, **packed(way), **same)
    for name, x in with_gradients(operands, way, **packed(way), **given).items():
        assert_close(x, want[name], way, message=name)


@pytest.mark.parametrize("window", [None, (-1, -1), (79, 79), (2**40, None)])
def test_full_attention_by_any_name(window: Any) -> None:
    way = Way("torch", "cpu", torch.float32)
    operands = example(way)
    assert_close(
        attention(*operands, causal=False, window=window),
        attention(*operands, causal=False),
        way,
    )


@EVERY_LANE
@ONE_DTYPE
@pytest.mark.parametrize("options", CHOICES[:3], ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_reaches_only_what_sees_it(way: Way, where: str, options: dict[str, Any]) -> None:
    operands = example(way)
    upstream = torch.randn(35, 2, 16).to(operands[0])
    clean = with_gradients(operands, way, upstream, **packed(way), **options)
    at = 45  # in the keys 13 to 59 of rows 3 to 19, at the place of row 5
    operands[NAMES.index(where)][at, 0, 5] = math.nan
    got = with_gradients(operands, way, upstream, **packed(way), **options)
    place = torch.arange(3, 20) + 40
    left, right = (6, 3) if "causal" in options else (999 if not options else 11, 0)
    left += "causal" in options
    right += "causal" in options
    sees = (place - left <= at) & (at <= place + right)
    blind = torch.cat([torch.ones(3), (~sees).float(), torch.ones(15)]).bool().to(way.device)
    assert 0 < int(sees.sum()) < 17
    assert_close(got["out"][blind], clean["out"][blind], way)
    assert_close(got["q"][blind], clean["q"][blind], way)
    assert got["out"][~blind].isnan().any(-1).all()
    others = [*range(13), *range(60, 80)]
    for name in ("k", "v"):
        assert_close(got[name][others], clean[name][others], way)


@EVERY_LANE
def test_unused_keys_and_rows_are_never_read(way: Way) -> None:
    operands = example(way)
    upstream = torch.randn(35, 2, 16).to(operands[0])
    clean = with_gradients(operands, way, upstream, **packed(way))
    for x, end in zip((*operands, upstream), (31, 71, 71, 31), strict=True):
        x[end:] = math.nan
    for x in operands[1:]:
        x[9:13] = math.nan  # of the document without rows
    for name, x in with_gradients(operands, way, upstream, **packed(way)).items():
        assert_close(x, clean[name], way, message=name)


@EVERY_LANE
@ONE_DTYPE
def test_rows_before_the_first_key_are_zeros(way: Way) -> None:
    """Compiled, so that offsets are not checked, as on a GPU."""
    rows, keys = ints(0, 9, 20).to(way.device), ints(0, 4, 30).to(way.device)
    operands = [x.requires_grad_() for x in example(way, 20, 30)]
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = compiled(*operands, cu_seqlens=rows, cu_seqlens_k=keys, impl=way.impl)
    assert (out[:5] == 0).all()
    assert (out[5:] != 0).any(-1).all()
    grads = torch.autograd.grad(out, operands, torch.ones_like(out))
    assert (grads[0][:5] == 0).all()
    assert all(x.isfinite().all() for x in grads)
    q, k, v = (x.detach() for x in operands)
    alone = attention(q[5:9], k[:4], v[:4], impl=way.impl)
    assert_close(out[5:9].detach(), alone, way)


@pytest.mark.parametrize("options", CHOICES[:3], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_compiled(options: dict[str, Any], documents: bool, full: bool) -> None:
    if documents == (options == CHOICES[1]) and not full:
        pytest.skip("each choice with and without documents: --full")
    way = Way("torch", "cpu", torch.float32)
    operands: Any = [x.requires_grad_() for x in example(way)]
    boundaries = packed(way) if documents else {}
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    want, got = (function(*operands, **boundaries, **options) for function in (attention, compiled))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(want)
    for a, b in zip(
        *(torch.autograd.grad(x, operands, upstream) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, CHOICES[1], CHOICES[2]], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_derivatives(options: dict[str, Any], documents: bool) -> None:
    way = Way("torch", "cpu", torch.float64)
    operands = [x.requires_grad_() for x in example(way, 6, 9)]
    boundaries: dict[str, Any] = (
        {"cu_seqlens": ints(0, 2, 5), "cu_seqlens_k": ints(0, 4, 8)} if documents else {}
    )

    def attend(*operands: Tensor) -> Tensor:
        return attention(*operands, **boundaries, **options)

    assert torch.autograd.gradcheck(attend, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, operands, atol=1e-4, fast_mode=True)


@pytest.mark.lanes("cpu", "interpret", "gpu")
@pytest.mark.parametrize("options", [{}, CHOICES[2]], ids=str)
def test_vmap_of_gradients(way: Way, options: dict[str, Any]) -> None:
    q, k, v = example(way, 2 * 10, 2 * 25)
    q, k, v = (x.view(2, -1, *x.shape[1:]) for x in (q, k, v))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        impl: Any = way.impl
        return attention(q, k, v, impl=impl, **options).float().square().sum()

    got = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, way)


def test_shapes_alone() -> None:
    q, k = torch.empty(2, 5, 4, 16, device="meta"), torch.empty(2, 9, 2, 16, device="meta")
    assert attention(q, k, k).shape == q.shape
    assert attention(q, k, k, causal=False, window=(3, 3)).shape == q.shape


def test_a_large_mask_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    from stlm_kernels.ops.attention import documents

    way = Way("torch", "cpu", torch.float32)
    operands, boundaries = example(way), packed(way)
    want = [attention(*operands, **each) for each in ({}, boundaries)]
    monkeypatch.setattr(documents, "MASK_ENTRIES", 10)
    monkeypatch.setattr(documents, "lower_right", None)
    for each, x in zip(({}, boundaries), want, strict=True):
        assert_close(attention(*operands, **each), x, way)


def test_the_kernels_know_windows_of_two_sides() -> None:
    q, k, v = example(Way("torch", "cpu", torch.float32))

    def causes(**options: Any) -> bool:
        return any("causal" in reason for reason in explain(attention, q, k, v, **options))

    assert not causes(causal=False, window=(3, -1))
    assert causes(causal=False)
    assert causes(causal=False, window=(-1, None))


@pytest.mark.parametrize(("boundaries", "times"), [({}, 1), ({"cu_seqlens_k": ROWS.clone()}, 2)])
def test_bounds_of_documents_are_found_once(boundaries: dict[str, Any], times: int) -> None:
    """Bounds of the backward come with the forward's, unless keys have documents of their own."""
    pytest.importorskip("triton")
    q, k, v = example(Way("torch", "cpu", torch.float32), keys=35)
    q.requires_grad_()
    names: list[str] = []
    with _launch.recording(lambda *call: names.append(call[0].__name__)):
        out = attention(q, k, v, window=7, cu_seqlens=ROWS, impl="triton", **boundaries)
        out.sum().backward()
    assert names.count("stlm_row_bounds") == times
    assert len(names) == 3 + times
