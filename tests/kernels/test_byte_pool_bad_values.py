"""byte_pool and arguments that are wrong: seen, and where values cannot be read."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.byte_pool import (
    ON_CPU,
    RESULT_LANES,
    int32,
    looped,
    pool_inputs,
    unseen,
    upstream_for,
    with_gradients,
)
from helpers.lanes import FP16, FP32, FP64, Way
from torch import Tensor

from stlm_kernels import byte_pool
from stlm_kernels.ops.byte_pool.reference import yardstick
from stlm_kernels.testing import GuardBand, assert_matches

# ---- values that are not looked at ----------------------------------------------------------


@RESULT_LANES
@pytest.mark.parametrize(
    ("slots", "vocab", "ids"),
    [
        (None, 100, torch.uint8),
        (None, 256, torch.int64),
        (None, 257, torch.int64),
        (2, 5, torch.uint8),
        (40, 100, torch.int16),
    ],
)
def test_unseen_bad_ids(way: Way, slots: int | None, vocab: int, ids: torch.dtype) -> None:
    """A bad id makes its patch NaN and is left out of every gradient; `vocab` picks the branch."""
    if way.dtype != FP32 and not (way.impl == "triton" and way.dtype == FP16):
        pytest.skip("one dtype of each kernel shows what values do")
    inputs = pool_inputs([4, 3, 0, 6, 2, 5], way, tail=3, vocab=vocab, slots=slots, ids=ids)
    bad = [255, 100] if ids == torch.uint8 else [-1, 2**15 - 1]
    inputs["byte_ids"][[5, 14]] = torch.tensor(bad, device=way.device).to(ids)
    if ids == torch.int64:
        inputs["byte_ids"][14] = 2**32  # the low half alone would be a good id
    upstream = upstream_for(inputs)
    clamped = {**inputs, "byte_ids": inputs["byte_ids"].long().clamp(0, vocab - 1)}
    yard = with_gradients(yardstick, clamped, upstream)
    got = with_gradients(unseen(way), inputs, upstream, impl=way.impl)
    want = looped(inputs, upstream)
    assert got["out"].isnan().all(1).tolist() == [False, True, False, False, True, False]
    for name, x in got.items():
        assert_matches(x, want[name], yard[name], name=name)


BAD_OFFSETS: list[tuple[list[int], list[int] | None]] = [
    ([3, 5, 9], [3, 5, 9]),
    ([-4, 5, 9], [0, 5, 9]),
    ([0, 5, 90], [0, 5, 20]),
    ([50, 60, 70], [20, 20, 20]),
    ([-9, -5, -1], [0, 0, 0]),
    ([0, 2**31 - 1, 2**31 - 1], [0, 20, 20]),
    ([0, 9, 4], None),
    ([12, -(2**31), 2**31 - 1], None),
]
"""Offsets, and what they are taken for; what decreases is only kept in bounds."""


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 2, 40])
def test_unseen_bad_offsets(way: Way, slots: int | None) -> None:
    """Bad offsets are clamped, never a crash nor a wild read."""
    if way.dtype != FP32 or (way.impl == "triton" and slots == 40):
        pytest.skip("one dtype shows what addresses do; only torch has a branch for many slots")
    op = unseen(way)
    inputs = pool_inputs([10, 10], way, vocab=4, slots=slots)
    upstream = upstream_for(inputs)
    for offsets, meant in BAD_OFFSETS:
        inputs["cu_patchlens"] = int32(*offsets).to(way.device)
        bands = {name: GuardBand(x) for name, x in inputs.items() if isinstance(x, Tensor)}
        guarded = {name: bands[name].tensor if name in bands else x for name, x in inputs.items()}
        got = with_gradients(op, guarded, upstream, impl=way.impl)
        assert all(x.isfinite().all() for x in got.values()), offsets
        for band in bands.values():
            band.assert_untouched()
        if meant is not None:
            want = looped({**inputs, "cu_patchlens": int32(*meant)}, upstream)
            for name, x in got.items():
                torch.testing.assert_close(x.cpu().double(), want[name], rtol=1e-5, atol=1e-5)


# ---- refusals ---------------------------------------------------------------------------------


TABLE = torch.ones(8, 4)
REFUSED = [
    ({"weight": [1.0]}, ValueError, "weight: expected a Tensor, got list"),
    ({"weight": TABLE[0]}, ValueError, "weight: expected shape (V, D), got (4,)"),
    ({"weight": TABLE.int()}, ValueError,
     "weight: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
    ({"weight": TABLE[:0]}, ValueError, "weight: expected V >= 1 and D >= 1, got (0, 4)"),
    ({"weight": TABLE[:, :0]}, ValueError, "weight: expected V >= 1 and D >= 1, got (8, 0)"),
    ({"byte_ids": TABLE[0]}, ValueError,
     "byte_ids: expected dtype uint8 or int16 or int32 or int64, got float32"),
    ({"byte_ids": int32(1)[None]}, ValueError, "byte_ids: expected shape (T,), got (1, 1)"),
    ({"byte_ids": int32(1).to("meta")}, ValueError, "byte_ids: expected device cpu, got meta"),
    ({"cu_patchlens": int32(0, 3).long()}, ValueError,
     "cu_patchlens: expected dtype int32, got int64"),
    ({"cu_patchlens": int32()}, ValueError,
     "cu_patchlens: expected at least 1 entry, got 0 entries"),
    ({"cu_patchlens": int32(0, 1).to("meta")}, ValueError,
     "cu_patchlens: expected device cpu, got meta"),
    ({"cu_patchlens": int32(1, 3)}, ValueError, "cu_patchlens: expected first entry 0, got 1"),
    ({"cu_patchlens": int32(0, 3, 2)}, ValueError,
     "cu_patchlens: expected non-decreasing entries, got 2 after 3 at position 2"),
    ({"cu_patchlens": int32(0, 7)}, ValueError, "cu_patchlens: expected last entry <= 6, got 7"),
    ({"mode": "max"}, ValueError,
     "mode: expected 'mean' or 'sum', or segment_pool of the embeddings, got 'max'"),
    ({"mode": "last"}, ValueError,
     "mode: expected 'mean' or 'sum', or segment_pool of the embeddings, got 'last'"),
    ({"mode": "maximum"}, ValueError, "mode: expected one of 'mean', 'sum', got 'maximum'"),
    ({"position_weight": TABLE[:, :3]}, ValueError,
     "position_weight: expected shape (L, 4), got (8, 3)"),
    ({"position_weight": TABLE[:0]}, ValueError, "position_weight: expected L >= 1, got 0"),
    ({"position_weight": TABLE.half()}, ValueError,
     "position_weight: expected dtype float32, got float16"),
    ({"position_weight": TABLE.double(), "weight": TABLE.half()}, ValueError,
     "position_weight: expected dtype float16 or float32, got float64"),
    ({"impl": "cuda"}, ValueError, "impl: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
    ({"byte_ids": int32(0, 1, 8, 9)}, IndexError,
     "byte_ids: expected values in [0, 7], got 8 at position 2"),
    ({"byte_ids": int32(0, -3, 2, 9).short()}, IndexError,
     "byte_ids: expected values in [0, 7], got -3 at position 1"),
]  # fmt: skip


@ON_CPU
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=lambda x: str(x)[:60])
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "byte_ids": int32(0, 1, 2, 3, 4, 5), "weight": TABLE, "cu_patchlens": int32(0, 3, 4),
    }  # fmt: skip
    byte_pool(**arguments)
    with pytest.raises(error, match="^" + re.escape(f"byte_pool: {message}") + "$"):
        byte_pool(**{**arguments, **change})


@pytest.mark.lanes("interpret", "gpu")
def test_the_kernels_refuse_fp64(way: Way) -> None:
    inputs = pool_inputs([2], Way(way.impl, way.device, FP64))
    with pytest.raises(NotImplementedError, match=r"weight is torch.float64; the kernels take"):
        byte_pool(**inputs, impl="triton")


@ON_CPU
def test_kernels_on_cpu_tensors_are_refused() -> None:
    inputs = pool_inputs([2], Way("triton", "cpu", FP64))
    with pytest.raises(NotImplementedError, match=r"on cpu.*; weight is torch.float64"):
        byte_pool(**inputs, impl="triton")
