"""attention beyond what every op owes: isolation, windows, documents, options, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.attention import (
    NAMES,
    assert_close,
    assert_close_to_reference,
    example,
    with_gradients,
)
from helpers.lanes import Way
from helpers.ops import assert_same
from helpers.tensors import ints
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stlm_kernels import attention, explain
from stlm_kernels.ops.attention.config import FARTHEST
from stlm_kernels.ops.attention.reference import reference

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")


# ---- isolation --------------------------------------------------------------------------------

BOUNDARIES = ints(0, 6, 6, 9, 36, 44)


@pytest.mark.lanes("cpu", "interpret", "compiled", "gpu")
@pytest.mark.parametrize(
    ("where", "poison", "window"),
    [
        ("q", math.nan, None),
        ("k", math.nan, 10),
        ("v", math.nan, 10),
        ("upstream", math.nan, None),
        ("v", math.inf, None),
        ("k", -math.inf, 10),
    ],
)
def test_nan_reaches_only_what_sees_it(
    way: Way, where: str, poison: float, window: int | None
) -> None:
    options = {"cu_seqlens": BOUNDARIES, "window": window}
    operands = example((50,), 1, 1, 16, way)
    upstream = torch.randn(50, 1, 16).to(operands[0])
    clean = with_gradients(operands, way, upstream, **options)
    sick = dict(zip((*NAMES, "upstream"), [*operands, upstream], strict=True))
    sick[where] = sick[where].clone()
    sick[where][15, 0, 5] = poison  # in the document of rows 9 to 35
    upstream = sick.pop("upstream")
    got = with_gradients(list(sick.values()), way, upstream, **options)
    others = [*range(9), *range(36, 50)]
    for name, x in got.items():
        assert_close(x[others], clean[name][others], way, message=f"{name} of {where}")
    assert_close(got["out"][9:15], clean["out"][9:15], way)
    if window is not None:  # a row sees no further back, so it is seen no further on
        assert_close(got["out"][25:], clean["out"][25:], way)
        assert_close(got["k"][34:], clean["k"][34:], way)
    if where in ("q", "upstream"):  # keys that the row does not see
        assert_close(got["k"][16:], clean["k"][16:], way)
        assert_close(got["v"][16:], clean["v"][16:], way)
    if where == "upstream":
        assert_same({"out": got["out"]}, {"out": clean["out"]})
        assert not got["v"][9:16, 0, 5].isfinite().any()
    elif where == "v" or math.isnan(poison):
        assert not got["out"][15, 0, 5].isfinite()
        for name in NAMES:
            assert not got[name][9:36].isfinite().all() or name == where == "v", name


@pytest.mark.lanes("cpu", "interpret", "compiled", "gpu")
@pytest.mark.parametrize("where", ["q", "upstream"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_head(way: Way, where: str, poison: float) -> None:
    """Query heads that share a key head may share a tile too."""
    operands = example((40,), 4, 1, 16, way)
    upstream = torch.randn(40, 4, 16).to(operands[0])
    clean = with_gradients(operands, way, upstream, window=30)
    sick = dict(zip((*NAMES, "upstream"), [*operands, upstream], strict=True))
    sick[where] = sick[where].clone()
    sick[where][20, 2, 5] = poison
    upstream = sick.pop("upstream")
    got = with_gradients(list(sick.values()), way, upstream, window=30)
    for name in ("out", "q"):
        assert_close(got[name][:, [0, 1, 3]], clean[name][:, [0, 1, 3]], way, message=name)
        others = [*range(20), *range(21, 40)]
        assert_close(got[name][others], clean[name][others], way, message=name)
    assert not got["q"][20, 2].isfinite().any()
    for name in ("k", "v"):  # those of the key head's keys that the row does not see
        assert_close(got[name][21:], clean[name][21:], way, message=name)
        assert not got[name][:21].isfinite().all()


@pytest.mark.lanes("cpu", "interpret", "compiled", "gpu")
@pytest.mark.parametrize("where", ["k", "v"])
def test_infinite_key_among_many_tiles(way: Way, where: str) -> None:
    """Tiles that see all of a block, some of it, or none."""
    operands = example((1, 300), 2, 1, 16, way)
    upstream = torch.randn(1, 300, 2, 16).to(operands[0])
    options = {"causal": False, "window": (70, 9)}
    clean = with_gradients(operands, way, upstream, **options)
    sick = dict(zip(NAMES, operands, strict=True))
    sick[where] = sick[where].clone()
    sick[where][0, 150, 0, 5] = math.inf
    got = with_gradients(list(sick.values()), way, upstream, **options)
    blind = [*range(141), *range(221, 300)]
    for name in ("out", "q"):
        assert_close(got[name][0, blind], clean[name][0, blind], way, message=name)
    far = [*range(71), *range(230, 300)]  # keys that no row sees which sees the sick one
    for name in ("k", "v"):
        assert_close(got[name][0, far], clean[name][0, far], way, message=name)
    assert not got["out"][0, 141:221, :, 5].isfinite().any() or where == "k"


@EVERY_LANE
@pytest.mark.parametrize("window", [None, 10])
def test_rows_of_no_document_are_never_read(way: Way, window: int | None) -> None:
    options = {"cu_seqlens": ints(0, 10, 10, 35), "window": window}
    operands = example((70,), 1, 1, 16, way)
    upstream = torch.randn(70, 1, 16).to(operands[0])
    clean = with_gradients(operands, way, upstream, **options)
    for x in (*operands, upstream):
        x[35:] = math.nan
    got = with_gradients(operands, way, upstream, **options)
    for name, x in got.items():
        assert_close(x, clean[name], way, 8)
        assert (x[35:] == 0).all(), name


@EVERY_LANE
def test_a_document_alone_and_among_others(way: Way) -> None:
    operands = example((50,), 2, 1, 16, way)
    upstream = torch.randn(50, 2, 16).to(operands[0])
    together = with_gradients(operands, way, upstream, cu_seqlens=BOUNDARIES, window=20)
    part = [x[9:36] for x in operands]
    alone = with_gradients(part, way, upstream[9:36], window=20)
    for name, x in alone.items():
        assert_close(x, together[name][9:36], way)


@EVERY_LANE
def test_causal_sees_no_later_row(way: Way) -> None:
    operands = example((1, 50), 1, 1, 16, way)
    before = attention(*operands, impl=way.impl)
    for x in operands:
        x[:, 30:] += 1
    after = attention(*operands, impl=way.impl)
    assert_close(before[:, :30], after[:, :30], way, 8)
    assert (before[:, 30:] != after[:, 30:]).any()


# ---- values -----------------------------------------------------------------------------------


@EVERY_LANE
def test_documents_of_one_row(way: Way) -> None:
    """The output is the value, and nothing flows through a softmax of one score."""
    operands = example((5,), 2, 1, 16, way)
    got = with_gradients(operands, way, cu_seqlens=ints(0, 1, 2, 3, 4, 5))
    assert torch.equal(got["out"], operands[2].expand(5, 2, 16))
    for name in ("q", "k"):
        assert float(got[name].abs().max()) <= 64 * torch.finfo(way.dtype).eps


@EVERY_LANE
def test_documents_of_two_rows(way: Way) -> None:
    """Short documents show a rounded output most in the backward."""
    boundaries = torch.arange(0, 61, 2, dtype=torch.int32)
    assert_close_to_reference(example((60,), 2, 1, 16, way), way, cu_seqlens=boundaries)


@EVERY_LANE
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(way: Way, sign: int) -> None:
    """exp of a score of 400 is not a float32; the largest score is taken off first."""
    operands = example((1, 80), 1, 1, 16, way)
    operands[0][:], operands[1][:] = 10, sign * 10
    operands[1][:, 3] *= 1.0625
    got = with_gradients(operands, way)
    want = reference(*[x.cpu().double() for x in operands])
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(got["out"].cpu().double(), want, rtol=400 * eps, atol=4 * eps)
    assert all(x.isfinite().all() for x in got.values())


@EVERY_LANE
@pytest.mark.parametrize("scale", [1e-60, 30.0])
def test_scales_far_from_one(way: Way, scale: float) -> None:
    """float32 holds no 1e-60, and what is masked stays masked."""
    operands = example((40,), 1, 1, 16, way)
    got = with_gradients(operands, way, scale=scale, window=9)
    want = reference(*[x.cpu().double() for x in operands], scale=scale, window=9)
    assert_close(got["out"].cpu().double(), want, way, 400)
    assert all(x.isfinite().all() for x in got.values())


@EVERY_LANE
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(way: Way, scale: float) -> None:
    """Plain SDPA on a CPU gives NaN there: its mask changes sign as well."""
    operands = example((40,), 1, 1, 16, way)
    got = assert_close_to_reference(operands, way, scale=scale)
    assert (got["q"] == 0).all() == (scale == 0)


@EVERY_LANE
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 9) | st.integers(60, 90), max_size=2),
    tail=st.integers(0, 9),
    window=st.none() | st.integers(1, 80),
    kv_heads=st.integers(1, 2),
)
def test_ragged_documents(
    way: Way, lengths: list[int], tail: int, window: int | None, kv_heads: int
) -> None:
    # The gradient of q in a document of one row is zero: the rest gives the errors their scale.
    boundaries = torch.tensor([0, *lengths, 12]).cumsum(0).int()
    operands = example((int(boundaries[-1]) + tail,), 2, kv_heads, 16, way)
    assert_close_to_reference(operands, way, cu_seqlens=boundaries, window=window)


@EVERY_LANE
def test_dense_rows_are_documents_of_one_length(way: Way) -> None:
    operands = example((3, 30), 2, 1, 32, way)
    upstream = torch.randn(3, 30, 2, 32).to(operands[0])
    dense = with_gradients(operands, way, upstream, window=9)
    flat = [x.flatten(0, 1) for x in operands]
    packed = with_gradients(
        flat, way, upstream.flatten(0, 1), window=9, cu_seqlens=ints(0, 30, 60, 90)
    )
    for name, x in dense.items():
        assert_close(x.flatten(0, 1), packed[name], way)


@EVERY_LANE
def test_a_window_that_covers_everything_is_none(way: Way) -> None:
    operands = example((1, 40), 1, 1, 16, way)
    none = with_gradients(operands, way)
    for window in (40, 2**40):
        for name, x in with_gradients(operands, way, window=window).items():
            assert_close(x, none[name], way, message=name)


# ---- layouts and arguments --------------------------------------------------------------------


@EVERY_LANE
def test_packed_and_transposed_operands(way: Way) -> None:
    rng = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 30, 3, 2, 16, generator=rng).to(way.device, way.dtype)
    slices = list(packed.unbind(2))
    plain = with_gradients([x.contiguous() for x in slices], way, window=12)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in slices]
    for operands in (slices, heads_first):
        assert not operands[0].is_contiguous()
        for name, x in with_gradients(operands, way, window=12).items():
            assert_close(x, plain[name], way, 8)


Q, KV = torch.zeros(6, 4, 16), torch.zeros(6, 2, 16)
LONGER = {"k": torch.zeros(9, 2, 16), "v": torch.zeros(9, 2, 16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q.int()}, "q: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
        ({"q": Q[0]}, r"q: expected shape \(T, H, K\), got \(4, 16\)"),
        ({"q": Q[..., :0]}, r"q: expected H >= 1 and K >= 1, got \(6, 4, 0\)"),
        ({"q": Q[None]}, r"k: expected shape \(1, T_kv, H_kv, 16\), got \(6, 2, 16\)"),
        ({"k": KV[:5], "v": KV[:5]}, "k: expected at least the 6 positions of q, got 5"),
        ({"k": KV[0]}, r"k: expected shape \(T_kv, H_kv, 16\), got \(2, 16\)"),
        ({"k": KV.half()}, "k: expected dtype float32, got float16"),
        ({"k": torch.zeros(6, 3, 16)}, "k: expected heads that divide the 4 of q, got 3"),
        ({"v": KV[:, :1]}, r"v: expected shape \(6, 2, 16\), got \(6, 1, 16\)"),
        ({"v": [1.0]}, "v: expected a Tensor, got list"),
        ({"causal": 1}, "causal: expected a bool, got 1"),
        ({"window": 0}, "window: expected an int >= 1, got 0"),
        ({"window": 2.0}, "window: expected an int >= 1, got 2.0"),
        (
            {"window": 4, "causal": False},
            "window: expected None or .left, right. with causal=False, got 4",
        ),
        ({"window": (4,)}, r"window: expected \(left, right\), got \(4,\)"),
        ({"window": (4, -2)}, "window: expected an int >= 0, got -2"),
        ({"window": (1.5, 0)}, "window: expected an int >= 0, got 1.5"),
        ({"window": (True, 0)}, "window: expected an int >= 0, got True"),
        ({"window": "ab"}, "window: expected an int >= 1, got 'ab'"),
        ({"cu_seqlens_k": ints(0, 6)}, "cu_seqlens_k: expected None without cu_seqlens"),
        (
            LONGER | {"cu_seqlens": ints(0, 6)},
            "k: expected the 6 positions of q without cu_seqlens_k, got 9",
        ),
        (
            LONGER | {"cu_seqlens": ints(0, 2, 6), "cu_seqlens_k": ints(0, 9)},
            r"cu_seqlens_k: expected shape \(3,\), got \(2,\)",
        ),
        (
            LONGER | {"cu_seqlens": ints(0, 6), "cu_seqlens_k": ints(0, 9).long()},
            "cu_seqlens_k: expected dtype int32, got int64",
        ),
        (
            LONGER | {"cu_seqlens": ints(0, 6), "cu_seqlens_k": ints(0, 10)},
            "cu_seqlens_k: expected last entry <= 9, got 10",
        ),
        (
            LONGER | {"cu_seqlens": ints(0, 2, 6), "cu_seqlens_k": ints(0, 6, 9)},
            "cu_seqlens_k: expected at least the 4 positions of document 1, got 3 keys",
        ),
        ({"cu_seqlens": ints(0, 6).long()}, "cu_seqlens: expected dtype int32, got int64"),
        ({"cu_seqlens": ints(1, 6)}, "cu_seqlens: expected first entry 0, got 1"),
        ({"cu_seqlens": ints(0, 4, 2)}, "expected non-decreasing entries, got 2 after 4"),
        ({"cu_seqlens": ints(0, 7)}, "cu_seqlens: expected last entry <= 6, got 7"),
        (
            {"q": Q[None], "k": KV[None], "v": KV[None], "cu_seqlens": ints(0, 6)},
            "cu_seqlens: expected None with a dense q, got a Tensor",
        ),
        ({"scale": math.inf}, "scale: expected None or a finite number, got inf"),
        ({"softcap": 0.0}, "softcap: expected None or a finite number > 0, got 0.0"),
        ({"dropout_p": 1.5}, r"dropout_p: expected a number in \[0, 1\], got 1.5"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**{"q": Q, "k": KV, "v": KV, **arguments})


def test_a_refusal_lists_every_reason() -> None:
    x = torch.zeros(6, 4, 20, dtype=torch.float64)
    options: dict[str, Any] = {"causal": False, "softcap": 1.0, "dropout_p": 0.1}
    with pytest.raises(NotImplementedError) as refusal:
        attention(x, x, x, impl="triton", **options)
    parts = ["are on cpu", "20 wide", "causal", "softcap", "dropout_p", "float64"]
    reasons = explain(attention, x, x, x, **options)
    for part in parts:
        assert part in str(refusal.value)
        assert sum(part in reason for reason in reasons) == 1, part


def test_long_dense_attention_of_wide_heads_is_left_to_sdpa() -> None:
    x = torch.zeros(1, 1024, 1, 128)

    def declines(x: Tensor, **options: Any) -> bool:
        return any("SDPA" in reason for reason in explain(attention, x, x, x, **options))

    assert declines(x)
    assert declines(x[0])
    assert declines(x, window=1024)
    assert not declines(x[:, :1000])
    assert not declines(x[..., :64])
    assert not declines(x, window=9)
    assert not declines(x[0], cu_seqlens=ints(0, 1024))
    assert not declines(x, impl="triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert not declines(x)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the compiler -----------------------------------------------------------------------------


@pytest.mark.lanes("gpu")
def test_canary_of_transposed_accumulators() -> None:
    """Triton 3.4 to 3.7.0 on Hopper: a dot of a transposed product was wrong. Not our kernels."""
    triton = pytest.importorskip("triton")
    from helpers.canary import transposed_product

    major = torch.cuda.get_device_capability()[0]
    version = tuple(int(x) for x in triton.__version__.split("+")[0].split(".")[:3])
    a, b, c = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    got = transposed_product(a, b, c)
    want = (a.float() @ b.float().T).to(torch.bfloat16).float().T @ c.float()
    wrong = not torch.allclose(got, want, rtol=0.02, atol=0.5)
    if wrong and major == 9 and (3, 4) <= version < (3, 7, 1):
        pytest.xfail(f"the known miscompile of triton {triton.__version__}")
    assert not wrong


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.parametrize("longer", [0, 100])
@pytest.mark.parametrize("sides", [(FARTHEST, 0), (FARTHEST, FARTHEST), (20, 3), (0, 0)])
@pytest.mark.parametrize("length", [FARTHEST - 100, 100])
def test_sight_of_a_tile_far_behind(
    way: Way, length: int, sides: tuple[int, int], longer: int
) -> None:
    """The last tile of the sixth sequence, whose last rows do not exist: beyond 2^31 in all."""
    pytest.importorskip("triton")
    from helpers.far_rows import sight_of

    tiles, other, before, behind = -(-length // 16), length + longer, *sides
    first, last, (base, count, low, high, all_first, all_last) = sight_of(
        6 * tiles - 1, length, other, sides, way.device
    )
    assert (base, count) == (6 * length - length % 16, length % 16)
    places = [base - 5 * length + longer + i for i in range(count)]
    assert first[:count] == [5 * other + max(0, place - before) for place in places]
    assert last[:count] == [5 * other + min(other, place + behind + 1) for place in places]
    assert (low, high) == (first[0], last[count - 1])
    assert (all_first, all_last) == (first[count - 1], last[0])


@EVERY_LANE
def test_values_with_a_large_mean_have_exact_gradients(way: Way) -> None:
    """The mean of dO . v cancels against rowsum(dO . out), of which `out` holds only 16 bits."""
    if (way.impl, way.device) == ("torch", "cuda"):
        pytest.skip("torch's own kernels on a GPU do not correct for it")
    q, k, v = example((24,), 2, 1, 16, way)
    assert_close_to_reference([q, k, v + 64], way, window=12)
