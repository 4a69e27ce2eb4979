"""decode_attention beyond what every op owes: what is never read, splits, layouts, errors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stlm_kernels import _launch, decode_attention, explain
from stlm_kernels.inspect import inspect_op
from stlm_kernels.ops.decode_attention import config
from stlm_kernels.ops.decode_attention.reference import reference, yardstick
from stlm_kernels.registry import OPS
from stlm_kernels.testing import assert_matches

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
SMALL = {"decode_attention_fwd": {"BLOCK": 16, "num_warps": 4, "num_stages": 2}}
"""Blocks of 16 entries, so that short caches take several steps and several parts."""


def example(
    batch: int, capacity: int, heads: int, kv_heads: int, width: int, way: Way
) -> tuple[Tensor, Tensor, Tensor]:
    cache = (batch, capacity, kv_heads, width)
    q, k, v = normal((batch, heads, width), cache, cache, way=way, seed=batch + capacity)
    return q, k, v


def decode(operands: Any, lens: Tensor, way: Way, **options: Any) -> Tensor:
    """Decode in blocks of 16; on the torch path also as a call that reads no length."""
    with _launch.overriding(SMALL):
        out = decode_attention(*operands, lens.to(way.device), impl=way.impl, **options)
    if way.impl == "torch":
        lens = lens.to(way.device)
        masked = torch.func.vmap(
            lambda q: decode_attention(q, *operands[1:], lens, impl="torch", **options)
        )(operands[0][None])[0]
        eps = torch.finfo(out.dtype).eps
        torch.testing.assert_close(out, masked, rtol=8 * eps, atol=8 * eps, equal_nan=True)
    return out


def assert_close_to_reference(operands: Any, lens: Tensor, way: Way, **options: Any) -> Tensor:
    got = decode(operands, lens, way, **options)
    stored = [x.cpu() for x in operands]
    want = reference(*[x.double() for x in stored], lens, **options)
    assert_matches(got, want, yardstick(*stored, lens, **options))
    return got


# ---- what is never read -----------------------------------------------------------------------


@EVERY_LANE
@pytest.mark.parametrize("window", [None, 1, 5, 20])
def test_hidden_entries_may_hold_anything(way: Way, window: int | None) -> None:
    q, k, v = example(4, 40, 2, 1, 16, way)
    lens = ints(0, 1, 17, 40)
    clean = decode((q, k, v), lens, way, window=window)
    for cache, poison in ((k, math.nan), (v, math.inf)):
        for b, end in enumerate(lens.tolist()):
            cache[b, end:] = poison
            cache[b, : max(0, end - (window or 40))] = -poison
    got = decode((q, k, v), lens, way, window=window)
    assert torch.equal(got, clean)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert (got[1:] != 0).any(-1).all()


@EVERY_LANE
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_stays_with_what_sees_it(way: Way, where: str) -> None:
    operands = dict(zip("qkv", example(2, 40, 4, 2, 16, way), strict=True))
    clean = decode([*operands.values()], ints(40, 40), way)
    operands[where][1, 3 if where == "q" else 33, ..., 5] = math.nan
    if where != "q":
        operands[where][1, 33, 0] = 0.5  # only the second key head is sick
    got = decode([*operands.values()], ints(40, 40), way)
    sick = torch.zeros(2, 4, dtype=torch.bool)
    sick[1, [3] if where == "q" else [2, 3]] = True
    assert torch.equal(got.isnan().any(-1).cpu(), sick)
    same = ~sick
    if where != "q":
        same[1] = False  # the first key head's entry changed as well
    assert torch.equal(got.cpu()[same], clean.cpu()[same])


@EVERY_LANE
def test_an_entry_of_no_weight_is_not_nan(way: Way) -> None:
    """A part of the cache whose scores are all -inf counts nothing beside the others."""
    q, k, v = example(1, 40, 2, 1, 16, way)
    q[:] = 1
    k[0, 16:32] = -math.inf
    got = decode_attention(q, k, v, ints(40).to(way.device), impl=way.impl)
    with _launch.overriding(SMALL):
        parts = decode_attention(q, k, v, ints(40).to(way.device), impl=way.impl)
    rest = [*range(16), *range(32, 40)]
    want = decode_attention(q, k[:, rest], v[:, rest], ints(24).to(way.device), impl=way.impl)
    eps = torch.finfo(way.dtype).eps
    torch.testing.assert_close(got, want, rtol=16 * eps, atol=16 * eps)
    torch.testing.assert_close(parts, want, rtol=16 * eps, atol=16 * eps)


# ---- values -----------------------------------------------------------------------------------


@EVERY_LANE
@settings(max_examples=6)
@given(
    lens=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 80),
    group=st.sampled_from([1, 3]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
)
def test_any_lengths(
    way: Way, lens: list[int], window: int | None, group: int, softcap: float | None
) -> None:
    operands = example(len(lens), 70, 2 * group, 2, 16, way)
    assert_close_to_reference(operands, ints(*lens), way, window=window, softcap=softcap)


@EVERY_LANE
def test_neighbours_of_equal_length(way: Way) -> None:
    """The torch path takes them together."""
    operands = example(6, 20, 2, 1, 16, way)
    assert_close_to_reference(operands, ints(9, 9, 0, 20, 20, 9), way, window=12)


@EVERY_LANE
def test_query_heads_share_key_heads_in_order(way: Way) -> None:
    q, k, v = example(1, 20, 4, 2, 16, way)
    got = decode((q, k, v), ints(20), way)
    eps = torch.finfo(way.dtype).eps
    for head in range(4):
        shared = slice(head // 2, head // 2 + 1)
        one = decode((q[:, head : head + 1], k[:, :, shared], v[:, :, shared]), ints(20), way)
        torch.testing.assert_close(one[:, 0], got[:, head], rtol=8 * eps, atol=8 * eps)


@EVERY_LANE
def test_large_scores_neither_overflow_nor_vanish(way: Way) -> None:
    q, k, v = example(1, 40, 1, 1, 16, way)
    q[:], k[:] = 10, 10
    k[0, 30] = 10.625
    got = decode((q, k, v), ints(40), way)
    torch.testing.assert_close(got[0, 0], v[0, 30, 0], rtol=1e-3, atol=1e-3)
    k[:] = -10
    k[0, 30] = -9.375
    got = decode((q, k, v), ints(40), way)
    torch.testing.assert_close(got[0, 0], v[0, 30, 0], rtol=1e-3, atol=1e-3)


@EVERY_LANE
def test_caches_are_read_where_they_lie(way: Way) -> None:
    """Views of larger buffers, heads before entries, a cache shared by all sequences."""
    q, k, v = example(2, 20, 4, 2, 16, way)
    lens = ints(20, 9)
    want = decode((q, k, v), lens, way)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    layers = torch.full((2, 3, 30, 2, 2, 16), math.nan).to(k)
    layers[:, 1, 5:25, :, 0], layers[:, 1, 5:25, :, 1] = k, v
    views = [layers[:, 1, 5:25, :, i] for i in range(2)]
    every_other = [torch.stack([x, x], -1)[..., 0] for x in (k, v)]
    eps = torch.finfo(way.dtype).eps
    for caches in (by_head, views, every_other):
        got = decode((q, *caches), lens, way)
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    own = [x.contiguous() for x in shared]
    torch.testing.assert_close(
        decode((q, *shared), lens, way), decode((q, *own), lens, way), rtol=8 * eps, atol=8 * eps
    )


@EVERY_LANE
def test_autocast_rounds_when_loading(way: Way) -> None:
    if way.dtype != torch.float32:
        pytest.skip("autocast is about fp32 arguments")
    narrow = torch.float16 if way.impl == "triton" else torch.bfloat16
    q, k, v = example(2, 40, 4, 2, 16, way)
    with torch.autocast(way.device, narrow):
        got = decode((q, k, v.to(narrow)), ints(40, 7), way)
    want = decode([x.to(narrow) for x in (q, k, v)], ints(40, 7), way)
    assert got.dtype == narrow
    assert torch.equal(got, want)


# ---- no gradient, unchecked lengths, splits ---------------------------------------------------


@EVERY_LANE
def test_the_result_never_requires_a_gradient(way: Way) -> None:
    operands = [x.requires_grad_() for x in example(2, 9, 2, 1, 16, way)]
    out = decode_attention(*operands, ints(9, 4).to(way.device), impl=way.impl)
    assert not out.requires_grad


@EVERY_LANE
def test_unchecked_lengths_out_of_range_are_clamped(way: Way) -> None:
    q, k, v = (x.float() for x in example(3, 20, 2, 1, 16, way))
    bad, meant = (x.to(way.device) for x in (ints(-5, 21, 2**31 - 1), ints(0, 20, 20)))
    for window in (None, 3):
        want = decode_attention(q, k, v, meant, window=window, impl=way.impl)
        got = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")(
            q, k, v, bad, window=window, impl=way.impl
        )
        torch.testing.assert_close(got, want)


@EVERY_LANE
@pytest.mark.parametrize("programs", [1, 2, 16])
def test_any_number_of_parts(way: Way, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps in one part, in two or in as many; the largest scores come late."""
    if way.impl == "torch" and programs > 1:
        pytest.skip("the torch path has no parts")
    q, k, v = example(1, 190, 2, 1, 16, way)
    k *= torch.linspace(0.5, 2, 190).to(k)[:, None, None]
    monkeypatch.setitem(SMALL["decode_attention_fwd"], "PROGRAMS", programs)
    assert_close_to_reference((q, k, v), ints(183), way)


def test_parts_follow_from_shapes() -> None:
    count = partial(config.split_count, block=64, programs=264)
    assert count(span=2048, tiles=4) == 32  # every block its own program
    assert count(span=8192, tiles=4) == 64
    assert count(span=1 << 20, tiles=1) == 64  # as many as are combined at once
    assert count(span=8192, tiles=256) == 1  # the device is full without
    assert count(span=0, tiles=1) == count(span=128, tiles=1) == 1
    assert count(span=129, tiles=1) == 3


@pytest.mark.lanes("aot")
@pytest.mark.parametrize("arch", [80, 90])
def test_products_run_on_the_tensor_cores(arch: int) -> None:
    """Sixteen rows are too few for Hopper's own instruction; the older one reads as fast."""
    spec = OPS["decode_attention"]
    reports = inspect_op(spec, spec.tagged("aot")[0], arch)
    assert {r.kernel: r.mma for r in reports}["stlm_decode_attention_fwd"] == "HMMA"


# ---- arguments --------------------------------------------------------------------------------

Q, CACHE, LENS = torch.zeros(2, 4, 16), torch.zeros(2, 6, 2, 16), ints(6, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q.int()}, ValueError, "q: expected dtype float32 or bfloat16 or float16 or float64"),
        ({"q": Q[0]}, ValueError, r"q: expected shape \(B, H, K\), got \(4, 16\)"),
        ({"q": Q[:, :0]}, ValueError, r"q: expected H >= 1 and K >= 1, got \(2, 0, 16\)"),
        ({"k_cache": CACHE[:1]}, ValueError, r"k_cache: expected shape \(2, C, H_kv, 16\)"),
        ({"k_cache": CACHE.half()}, ValueError, "k_cache: expected dtype float32, got float16"),
        ({"k_cache": CACHE.to("meta")}, ValueError, "k_cache: expected device cpu, got meta"),
        ({"k_cache": torch.zeros(2, 6, 3, 16)}, ValueError, "heads that divide the 4 of q, got 3"),
        ({"k_cache": CACHE[:, :, :0]}, ValueError, "heads that divide the 4 of q, got 0"),
        ({"v_cache": CACHE[:, :5]}, ValueError, r"v_cache: expected shape \(2, 6, 2, 16\)"),
        ({"v_cache": [1.0]}, ValueError, "v_cache: expected a Tensor, got list"),
        ({"cache_lens": LENS.long()}, ValueError, "cache_lens: expected dtype int32, got int64"),
        ({"cache_lens": ints(6)}, ValueError, r"cache_lens: expected shape \(2,\), got \(1,\)"),
        (
            {"cache_lens": ints(6, 7)},
            IndexError,
            r"cache_lens: expected values in \[0, 6\], got 7 at position 1",
        ),
        ({"cache_lens": ints(-1, 6)}, IndexError, "got -1 at position 0"),
        ({"window": 0}, ValueError, "window: expected an int >= 1, got 0"),
        ({"window": 2.0}, ValueError, "window: expected an int >= 1, got 2.0"),
        ({"scale": math.inf}, ValueError, "scale: expected None or a finite number, got inf"),
        ({"scale": "half"}, ValueError, "scale: expected None or a finite number, got 'half'"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a finite number > 0, got 0.0"),
        ({"softcap": math.nan}, ValueError, "softcap: expected None or a finite number > 0"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_lens": LENS}
    with pytest.raises(error, match=message):
        decode_attention(**(good | change))


def test_a_refusal_lists_every_reason() -> None:
    q, cache = Q.double()[..., :8], CACHE.double()[..., :8]
    with pytest.raises(
        NotImplementedError, match=r"on cpu .*; q is torch.float64; .*heads are 8 wide"
    ):
        decode_attention(q, cache, cache, LENS, impl="triton")
    assert any(
        "heads are 8 wide" in text for text in explain(decode_attention, q, cache, cache, LENS)
    )
