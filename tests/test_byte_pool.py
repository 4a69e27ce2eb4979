"""byte_pool beyond what every op owes: an oracle of its own, bad values, autocast, scale, CUDA."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BF16, FP16, FP32, FP64, Way
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stlm_kernels import _launch, byte_pool
from stlm_kernels._inputs import random_ids, text_bytes
from stlm_kernels._spec import Inputs
from stlm_kernels.ops.byte_pool.reference import yardstick
from stlm_kernels.testing import GuardBand, assert_matches, poisoned_memory

RESULT_LANES = pytest.mark.lanes("cpu", "interpret", "gpu")
ON_GPU = pytest.mark.lanes("gpu")
ON_CPU = pytest.mark.lanes("cpu")

SMALL_TILES = {
    "byte_pool_fwd": {"BLOCK_P": 2, "BLOCK_D": 16, "PATCHES": 4, "num_warps": 4},
    "byte_pool_bwd": {
        "BLOCK_V": 16, "BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 4096, "num_warps": 4,
    },
    "byte_pool_bwd_gain": {
        "BLOCK_V": 16, "BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 4096, "num_warps": 4,
    },
}  # fmt: skip
"""Many programs and a split for every 16 patches, at sizes that an interpreter can walk."""


# ---- an oracle that shares nothing with the library -------------------------------------------


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def looped(inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    """Result and gradients by the definition, one byte after the other; bad ids give no gradient.

    A gain is rounded to the table's dtype, as the contract says.
    """
    weight, up = as_array(inputs["weight"]), as_array(upstream)
    gain = inputs.get("slot_gain")
    gains = np.ones((1, weight.shape[1]))
    if gain is not None:
        gains = as_array(gain.to(inputs["weight"].dtype))
    ids, borders = inputs["byte_ids"].tolist(), inputs["cu_patchlens"].tolist()
    out = np.zeros((len(borders) - 1, weight.shape[1]))
    dweight, dgain = np.zeros_like(weight), np.zeros_like(gains)
    for p in range(len(borders) - 1):
        length = borders[p + 1] - borders[p]
        scale = 1.0 / max(length, 1) if inputs["mode"] == "mean" else 1.0
        for k in range(length):
            byte, slot = ids[borders[p] + k], min(k, len(gains) - 1)
            if not 0 <= byte < len(weight):
                out[p] = np.nan
                continue
            out[p] += scale * gains[slot] * weight[byte]
            dweight[byte] += scale * gains[slot] * up[p]
            dgain[slot] += scale * weight[byte] * up[p]
    found = {"out": out, "weight": dweight, "slot_gain": dgain}
    return {name: torch.from_numpy(x) for name, x in found.items()}


def as_leaves(inputs: Inputs) -> Inputs:
    """The same arguments, those with a gradient as fresh leaves."""
    leaves = dict(inputs)
    for name in ("weight", "slot_gain"):
        if leaves.get(name) is not None:
            leaves[name] = leaves[name].detach().clone().requires_grad_()
    return leaves


def with_gradients(
    op: Callable[..., Tensor], inputs: Inputs, upstream: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The result and the gradients by name."""
    leaves = as_leaves(inputs)
    out = op(**leaves, **options)
    names = [name for name in ("weight", "slot_gain") if leaves.get(name) is not None]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], upstream.to(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(got[name].cpu(), x.cpu()), name


def upstream_for(inputs: Inputs, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
    weight = inputs["weight"]
    rng = torch.Generator().manual_seed(seed)
    shape = (inputs["cu_patchlens"].shape[0] - 1, weight.shape[1])
    return torch.randn(shape, generator=rng).to(weight.device, dtype or weight.dtype)


def assert_right(inputs: Inputs, impl: str, upstream: Tensor | None = None) -> None:
    """Result and gradients against the loop, by the tolerance rule."""
    upstream = upstream_for(inputs) if upstream is None else upstream
    with poisoned_memory():
        got = with_gradients(byte_pool, inputs, upstream, impl=impl)
    stock = with_gradients(yardstick, inputs, upstream)
    want = looped(inputs, upstream)
    for name, x in got.items():
        assert x.dtype == (inputs["weight"] if name == "out" else inputs[name]).dtype
        if x.dtype == FP64:
            # The loop rounds like the result, so the rule would compare two rounding errors.
            torch.testing.assert_close(x.cpu(), want[name], rtol=1e-12, atol=1e-12)
            continue
        assert_matches(x, want[name], stock[name], name=name, rows=name == "weight")


def pool_inputs(
    lengths: list[int],
    way: Way,
    *,
    tail: int = 0,
    vocab: int = 256,
    width: int = 24,
    mode: str = "mean",
    slots: int | None = None,
    ids: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Inputs:
    """Arguments with these patch lengths, and `tail` bytes that belong to no patch."""
    rng = torch.Generator().manual_seed(seed)
    used = min(vocab, 256) if ids == torch.uint8 else vocab
    borders = np.cumsum([0, *lengths])
    inputs: Inputs = {
        "byte_ids": random_ids(int(borders[-1]) + tail, used, ids, rng).to(way.device),
        "weight": torch.randn(vocab, width, generator=rng).to(way.device, way.dtype),
        "cu_patchlens": torch.from_numpy(borders).int().to(way.device),
        "mode": mode,
    }
    if slots is not None:
        gain = 1 + torch.randn(slots, width, generator=rng) / 2
        inputs["slot_gain"] = gain.to(way.device, way.dtype)
    return inputs


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def interpreted(way: Way) -> bool:
    return way.impl == "triton" and way.device == "cpu"


def unseen(way: Way) -> Callable[..., Tensor]:
    """byte_pool where it cannot look at values: on a GPU anyway, on a CPU when compiled."""
    if way.device == "cuda":
        return byte_pool
    torch._dynamo.reset()
    return torch.compile(byte_pool, backend="aot_eager", fullgraph=True)


# ---- values and gradients ---------------------------------------------------------------------


@RESULT_LANES
@given(data=st.data())
def test_any_shape_against_the_loop(way: Way, data: st.DataObject) -> None:
    longest, widest, largest, slots = (300, 130, 512, 40)
    if interpreted(way):
        longest, widest, largest, slots = (8, 40, 150, 5)
    few = st.integers(0, 6)
    lengths = data.draw(st.lists(few | st.integers(1, longest), max_size=8), label="lengths")
    width = data.draw(st.integers(1, widest), label="D")
    vocab = data.draw(st.integers(1, largest), label="V")
    if way.impl == "triton" and way.dtype == BF16:
        # One bf16 piece of scale * G is within the rule on a table, not on any single number:
        # a patch "aaa" has the gradient 3 * (g / 3), which stock torch happens to get exactly.
        lengths, width, vocab = [*lengths, *range(1, 40)], max(width, 16), max(vocab, 64)
    inputs = pool_inputs(
        lengths,
        way,
        tail=data.draw(few, label="tail"),
        vocab=vocab,
        width=width,
        mode=data.draw(st.sampled_from(["mean", "sum"]), label="mode"),
        slots=data.draw(st.none() | st.integers(1, slots), label="L"),
        ids=data.draw(
            st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]), label="ids"
        ),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    assert_right(inputs, way.impl)


@RESULT_LANES
@pytest.mark.parametrize(
    ("lengths", "tail", "options"),
    [
        pytest.param([1] * 20, 0, {}, id="P=T"),
        pytest.param([23], 0, {}, id="P=1"),
        pytest.param([], 0, {}, id="P=0,T=0"),
        pytest.param([], 9, {}, id="P=0"),
        pytest.param([0, 0, 0], 0, {}, id="T=0"),
        pytest.param([0, 0, 5, 0, 1, 0], 0, {}, id="empties"),
        pytest.param([4, 3, 2], 11, {}, id="tail"),
        pytest.param([3] * 9, 0, {"width": 1, "vocab": 1}, id="D=1,V=1"),
        pytest.param([3] * 9, 0, {"vocab": 512, "ids": torch.int16, "width": 130}, id="V=512"),
        pytest.param([2, 7, 5], 3, {"slots": 40}, id="L=40"),
        pytest.param([2, 7, 5], 3, {"slots": 1, "mode": "sum"}, id="L=1"),
        pytest.param([6] * 12, 2, {"slots": 3, "vocab": 4}, id="L*V<T"),
    ],
)
def test_named_edges(way: Way, lengths: list[int], tail: int, options: dict[str, Any]) -> None:
    inputs = pool_inputs(lengths, way, tail=tail, **options)
    # A gradient of ones: on one number, random ones measure luck (see the test above).
    shape = (len(lengths), inputs["weight"].shape[1])
    assert_right(inputs, way.impl, torch.ones(shape, dtype=way.dtype, device=way.device))


@RESULT_LANES
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_patches_longer_than_a_count_piece(way: Way, mode: str) -> None:
    """Counts above 256 are no bf16 numbers: pieces of a long patch must all arrive, each once."""
    if interpreted(way) and mode == "mean":
        pytest.skip("slow in the interpreter")
    longest = 270 if interpreted(way) else 530
    inputs = pool_inputs([longest, 3, 257, 0], way, vocab=5, width=3, mode=mode)
    inputs["byte_ids"][:longest] = 2
    assert_right(inputs, way.impl)


@RESULT_LANES
def test_a_thousand_ones_sum_to_a_thousand(way: Way) -> None:
    """Forward and gradient: 16-bit accumulation would stop at 256 (bf16) or drift."""
    count = 300 if interpreted(way) else 1000  # both are bf16 numbers
    inputs = pool_inputs([count], way, vocab=1, width=2, mode="sum")
    inputs["weight"].fill_(1)
    upstream = torch.ones(1, 2, device=way.device)
    for x in with_gradients(byte_pool, inputs, upstream, impl=way.impl).values():
        assert x.tolist() == [[count, count]]


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 3])
def test_many_splits_and_tiles(way: Way, slots: int | None) -> None:
    """Every split, row tile, column tile and patch chunk arrives, the last ones too."""
    lengths = [1 + i % 3 for i in range(50)]
    inputs = pool_inputs(lengths, way, vocab=20, width=18, slots=slots)
    with _launch.overriding(SMALL_TILES):
        assert_right(inputs, way.impl)


@RESULT_LANES
@pytest.mark.parametrize("byte", [0, 63, 64, 127, 128, 255])
def test_a_lone_byte_reaches_its_row(way: Way, byte: int) -> None:
    """Tiles of the table's gradient that no byte hits are skipped; these ids are at their edges."""
    inputs = pool_inputs([1], way, width=1)
    inputs["byte_ids"].fill_(byte)
    got = with_gradients(byte_pool, inputs, torch.ones(1, 1), impl=way.impl)
    assert got["weight"].nonzero().tolist() == [[byte, 0]]
    assert got["out"].item() == inputs["weight"][byte].item()


@RESULT_LANES
def test_a_patch_does_not_see_its_neighbours(way: Way) -> None:
    inputs = pool_inputs([3, 7, 1, 12, 4], way)
    together = byte_pool(**inputs, impl=way.impl)
    alone = {**inputs, "byte_ids": inputs["byte_ids"][10:23]}
    alone["cu_patchlens"] = inputs["cu_patchlens"][2:5] - 10
    assert torch.equal(byte_pool(**alone, impl=way.impl), together[2:4])


@RESULT_LANES
def test_more_patches_than_a_grid_dimension(way: Way) -> None:
    """70,001 patches of at most one byte, so that the right answer is a plain lookup."""
    if way.dtype not in (FP32, FP16):
        pytest.skip("two dtypes show what indexing does")
    patches = 70_001
    wide = {"BLOCK_V": 16, "BLOCK_P": 1024, "BLOCK_D": 16, "PROGRAMS": 8, "num_warps": 4}
    configs = {
        "byte_pool_fwd": {"BLOCK_P": 1024, "BLOCK_D": 16, "PATCHES": 1024, "num_warps": 4},
        "byte_pool_bwd": wide,
    }
    inputs = pool_inputs([1] * patches, way, vocab=9, width=2)
    with _launch.overriding(configs) if interpreted(way) else nullcontext():
        got = with_gradients(byte_pool, inputs, torch.ones(patches, 2), impl=way.impl)
    ids = inputs["byte_ids"].long()
    assert torch.equal(got["out"], inputs["weight"][ids])
    counts = torch.bincount(ids, minlength=9)[:, None].to(way.dtype)
    assert torch.equal(got["weight"], counts.expand(9, 2))


@RESULT_LANES
def test_a_slice_of_a_wider_table(way: Way) -> None:
    """Columns of a tied table: same bits as a copy, and the gradient lands in those columns."""
    inputs = pool_inputs([3, 0, 5, 2], way, width=20)
    upstream = upstream_for(inputs)
    want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    whole = torch.randn(256, 50, device=way.device).to(way.dtype)
    whole[:, 7:27] = inputs["weight"]
    whole.requires_grad_()
    out = byte_pool(**{**inputs, "weight": whole[:, 7:27]}, impl=way.impl)
    out.backward(upstream)
    assert torch.equal(out, want["out"])
    assert torch.equal(whole.grad[:, 7:27], want["weight"])
    assert not whole.grad[:, :7].any()
    assert not whole.grad[:, 27:].any()


@RESULT_LANES
def test_misaligned_ids_and_offsets(way: Way) -> None:
    inputs = pool_inputs([3, 0, 5, 2], way)
    moved = dict(inputs)
    for name in ("byte_ids", "cu_patchlens"):
        x = inputs[name]
        moved[name] = torch.cat([x[:1], x])[1:]
    assert torch.equal(byte_pool(**moved, impl=way.impl), byte_pool(**inputs, impl=way.impl))


@RESULT_LANES
def test_fp32_gain_beside_a_16_bit_table(way: Way) -> None:
    if way.dtype not in (BF16, FP16):
        pytest.skip("the table has 16 bits")
    inputs = pool_inputs([3, 0, 5, 2, 9], way, tail=2, slots=4)
    inputs["slot_gain"] = 1 + torch.randn(4, 24, device=way.device) / 2
    assert_right(inputs, way.impl)
    rounded = {**inputs, "slot_gain": inputs["slot_gain"].to(way.dtype)}
    assert torch.equal(byte_pool(**inputs, impl=way.impl), byte_pool(**rounded, impl=way.impl))


# ---- NaN and what belongs to nobody -----------------------------------------------------------


@RESULT_LANES
def test_a_nan_row_stays_in_the_patches_that_use_it(way: Way) -> None:
    inputs = pool_inputs([2, 0, 3, 2], way, vocab=8)
    inputs["byte_ids"][:] = torch.tensor([1, 2, 5, 1, 2, 3, 4])
    inputs["weight"][5] = float("nan")
    got = with_gradients(byte_pool, inputs, torch.ones(4, 24), impl=way.impl)
    assert got["out"].isnan().all(1).tolist() == [False, False, True, False]
    assert got["out"][[0, 1, 3]].isfinite().all()
    assert got["weight"].isfinite().all()


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 2, 40])
def test_nan_upstream_at_an_empty_patch_reaches_nothing(way: Way, slots: int | None) -> None:
    inputs = pool_inputs([2, 0, 3, 0, 2, 0], way, vocab=3, slots=slots)
    upstream = upstream_for(inputs)
    upstream[[1, 3, 5]] = 0
    clean = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    upstream[[1, 3, 5]] = float("nan")
    dirty = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 2, 40])
def test_bytes_of_no_patch_are_never_read(way: Way, slots: int | None) -> None:
    """Padding may hold anything, -1 too: no error, no NaN, no gradient."""
    inputs = pool_inputs([4, 0, 3], way, tail=6, vocab=9, slots=slots, ids=torch.int16)
    inputs["byte_ids"][:7] %= 5
    inputs["byte_ids"][7:] = 8
    upstream = upstream_for(inputs)
    inputs["weight"][8] = float("nan")
    want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    assert want["out"].isfinite().all()
    assert not want["weight"][5:].any()
    padded = {**inputs, "byte_ids": inputs["byte_ids"].clone()}
    padded["byte_ids"][7:] = torch.tensor([-1, 300, 9, -32768, 32767, 8])
    # Compiled too, where the bytes must be masked without being looked at.
    for op in (byte_pool, unseen(way)) if way.dtype == FP32 else (byte_pool,):
        got = with_gradients(op, padded, upstream, impl=way.impl)
        for name in ("out", "weight"):
            torch.testing.assert_close(got[name], want[name], equal_nan=True)


# ---- values that nobody has looked at ---------------------------------------------------------


@RESULT_LANES
@pytest.mark.parametrize(
    ("slots", "vocab", "ids"),
    [
        (None, 100, torch.uint8),
        (None, 256, torch.int64),
        (2, 5, torch.uint8),
        (40, 100, torch.int16),
    ],
)
def test_unseen_bad_ids(way: Way, slots: int | None, vocab: int, ids: torch.dtype) -> None:
    """A bad id makes its patch NaN and is left out of every gradient; `vocab` picks the branch."""
    if way.dtype != FP32:
        pytest.skip("one dtype shows what values do")
    inputs = pool_inputs([4, 3, 0, 6, 2, 5], way, tail=3, vocab=vocab, slots=slots, ids=ids)
    bad = [255, 100] if ids == torch.uint8 else [-1, 2**15 - 1]
    inputs["byte_ids"][[5, 14]] = torch.tensor(bad, device=way.device).to(ids)
    if ids == torch.int64:
        inputs["byte_ids"][14] = 2**32  # the low half alone would be a good id
    upstream = upstream_for(inputs)
    stock_inputs = {**inputs, "byte_ids": inputs["byte_ids"].long().clamp(0, vocab - 1)}
    stock = with_gradients(yardstick, stock_inputs, upstream)
    got = with_gradients(unseen(way), inputs, upstream, impl=way.impl)
    want = looped(inputs, upstream)
    assert got["out"].isnan().all(1).tolist() == [False, True, False, False, True, False]
    for name, x in got.items():
        assert_matches(x, want[name], stock[name], name=name)


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
    """They are clamped, never a crash nor a wild read."""
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
    ({"mode": "max"}, ValueError, "mode: expected one of 'mean', 'sum', got 'max'"),
    ({"slot_gain": TABLE[:, :3]}, ValueError, "slot_gain: expected shape (L, 4), got (8, 3)"),
    ({"slot_gain": TABLE[:0]}, ValueError, "slot_gain: expected L >= 1, got 0"),
    ({"slot_gain": TABLE.half()}, ValueError,
     "slot_gain: expected dtype float32, got float16"),
    ({"slot_gain": TABLE.double(), "weight": TABLE.half()}, ValueError,
     "slot_gain: expected dtype float16 or float32, got float64"),
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
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
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


# ---- autocast ---------------------------------------------------------------------------------


@RESULT_LANES
@pytest.mark.parametrize("slots", [None, 3, 40])
@pytest.mark.parametrize("upstream_kind", ["random", "ones"])
@pytest.mark.parametrize("lower", [BF16, FP16], ids=str)
def test_autocast(way: Way, lower: torch.dtype, slots: int | None, upstream_kind: str) -> None:
    """The table is rounded when loaded; its gradient is written once, in fp32.

    Thirds show a scaled gradient that was cut to 16 bits on its way: its error is no chance.
    """
    if way.dtype != FP32 or (interpreted(way) and lower == BF16):
        pytest.skip("an fp32 table, and no bf16 in the interpreter")
    inputs = pool_inputs([3, 6, 0, 3, 12, 1, 3], way, vocab=12, slots=slots)
    upstream = upstream_for(inputs, lower)
    if upstream_kind == "ones":
        upstream.fill_(1)
    held = {
        name: x.to(lower).float() if name in ("weight", "slot_gain") else x
        for name, x in inputs.items()
    }
    with torch.autocast(way.device, dtype=lower):
        got = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
        # The rule would forgive digits that the rounded table does not have.
        assert_same(with_gradients(byte_pool, held, upstream, impl=way.impl), got)
    want = looped(held, upstream)
    stock = with_gradients(yardstick, held, upstream)
    stock["out"] = stock["out"].to(lower)
    assert got["out"].dtype == lower
    for name, x in got.items():
        assert name == "out" or x.dtype == FP32
        assert_matches(x, want[name], stock[name], name=name, rows=name == "weight")


@ON_CPU
def test_autocast_leaves_fp64_alone() -> None:
    inputs = pool_inputs([3, 2], Way("torch", "cpu", FP64))
    with torch.autocast("cpu", dtype=BF16):
        out = byte_pool(**inputs)
    assert torch.equal(out, byte_pool(**inputs))


# ---- compilers --------------------------------------------------------------------------------


@RESULT_LANES
def test_dynamic_shapes_do_not_recompile(way: Way) -> None:
    if way.dtype != FP32:
        pytest.skip("one dtype shows what tracing does")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(byte_pool, backend=counter, fullgraph=True)
    for patches in (3, 5, 8, 13, 4):
        inputs = pool_inputs([1 + i % 3 for i in range(patches)], way, tail=patches % 4, vocab=12)
        upstream = upstream_for(inputs)
        got = with_gradients(compiled, inputs, upstream, impl=way.impl)
        want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.lanes("cpu", "gpu")
def test_inductor(way: Way) -> None:
    if way.dtype != FP32:
        pytest.skip("one compilation is slow enough")
    torch._dynamo.reset()
    inputs = pool_inputs([3, 0, 5, 2], way, tail=2, vocab=300)
    upstream = upstream_for(inputs)
    got = with_gradients(torch.compile(byte_pool), inputs, upstream, impl=way.impl)
    want = with_gradients(byte_pool, inputs, upstream, impl=way.impl)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


@ON_CPU
@pytest.mark.filterwarnings("error")
def test_vmap_over_tables_needs_no_slow_fallback() -> None:
    inputs = pool_inputs([3, 0, 5], Way("torch", "cpu", FP32))
    tables = torch.stack([inputs["weight"], 2 * inputs["weight"]])
    both = torch.func.vmap(lambda table: byte_pool(**{**inputs, "weight": table}))(tables)
    torch.testing.assert_close(both[1], 2 * byte_pool(**inputs))


# ---- the tolerance rule on this op: planted mutations -----------------------------------------


def english_inputs(seed: int, dtype: torch.dtype, patches: int, width: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    total = 6 * patches
    inner = torch.randint(0, total, (patches - 1,), generator=rng).sort().values
    return {
        "byte_ids": text_bytes("english", total, rng),
        "weight": torch.randn(256, width, generator=rng).to(dtype),
        "cu_patchlens": torch.cat([torch.zeros(1), inner, torch.full((1,), total)]).int(),
        "mode": "mean",
    }


def without_rarest_row(grad: Tensor) -> Tensor:
    norms = grad.float().norm(dim=1)
    rarest = norms.where(norms > 0, torch.inf).argmin()
    return grad.index_fill(0, rarest, 0)


def without_tail(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], torch.zeros_like(x[-1:])])


def one_less(borders: Tensor) -> Tensor:
    return torch.cat([borders[:1], (borders[1:] - 1).clamp(0)])


def emptied(borders: Tensor) -> Tensor:
    """The last patch holds nothing."""
    return torch.cat([borders[:-1], borders[-2:-1]])


SPOILED_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "off by one": lambda x: x.roll(1, 0),
    "half": lambda x: x * 0.5,
    "2% more": lambda x: (x.float() * 1.02).to(x.dtype),
    "zero": torch.zeros_like,
}
SPOILED_OUT = {**SPOILED_VALUES, "dropped tail": without_tail}
SPOILED_GRAD = {**SPOILED_VALUES, "dropped rarest row": without_rarest_row}
SPOILED_ARGUMENTS: dict[str, Callable[[Inputs], Inputs]] = {
    "missing scale": lambda x: {**x, "mode": "sum"},
    "ids off by one": lambda x: {**x, "byte_ids": x["byte_ids"].roll(1)},
    "last byte of each patch dropped": lambda x: {**x, "cu_patchlens": one_less(x["cu_patchlens"])},
    "last patch dropped": lambda x: {**x, "cu_patchlens": emptied(x["cu_patchlens"])},
}


@ON_CPU
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("seed", "patches", "width"), [(0, 40, 16), (1, 200, 5), (2, 900, 48)])
def test_planted_mutations_are_rejected(
    dtype: torch.dtype, seed: int, patches: int, width: int
) -> None:
    inputs = english_inputs(seed, dtype, patches, width)
    upstream = upstream_for(inputs, seed=seed)
    want = looped(inputs, upstream)
    stock = with_gradients(yardstick, inputs, upstream)
    right = with_gradients(byte_pool, inputs, upstream)

    def judge(found: dict[str, Tensor]) -> None:
        for name, x in found.items():
            assert_matches(x, want[name], stock[name], name=name, rows=name == "weight")

    judge(right)
    spoiled = {f"out {k}": {"out": f(right["out"])} for k, f in SPOILED_OUT.items()}
    spoiled |= {f"grad {k}": {"weight": f(right["weight"])} for k, f in SPOILED_GRAD.items()}
    for name, change in SPOILED_ARGUMENTS.items():
        wrong = with_gradients(byte_pool, change(inputs), upstream)
        spoiled |= {f"{k} {name}": {k: x} for k, x in wrong.items()}
    survivors = [name for name, found in spoiled.items() if accepted(judge, found)]
    assert not survivors


def accepted(judge: Callable[[dict[str, Tensor]], None], found: dict[str, Tensor]) -> bool:
    try:
        judge(found)
    except AssertionError:
        return False
    return True


# ---- CUDA -------------------------------------------------------------------------------------


def on_cuda(dtype: torch.dtype = BF16, index: int = 0, **options: Any) -> Inputs:
    lengths = [i % 9 for i in range(500)]
    return pool_inputs(lengths, Way("triton", f"cuda:{index}", dtype), width=96, **options)


@ON_GPU
@pytest.mark.parametrize("slots", [None, 5])
def test_no_synchronisation(slots: int | None) -> None:
    inputs = on_cuda(slots=slots)
    upstream = upstream_for(inputs)
    want = with_gradients(byte_pool, inputs, upstream, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = with_gradients(byte_pool, inputs, upstream, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, want)


@ON_GPU
@pytest.mark.parametrize("slots", [None, 5])
def test_graph_replay_with_changed_contents(slots: int | None) -> None:
    static, other = on_cuda(slots=slots), on_cuda(slots=slots, seed=7)
    other["cu_patchlens"] = other["cu_patchlens"] // 2
    upstream = upstream_for(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        with_gradients(byte_pool, static, upstream, impl="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(byte_pool, static, upstream, impl="triton")
    for name, x in static.items():
        if isinstance(x, Tensor):
            x.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, with_gradients(byte_pool, other, upstream, impl="triton"))


@ON_GPU
def test_another_stream() -> None:
    """The kernels run on the current stream: behind the slow work that makes their inputs."""
    inputs = on_cuda()
    upstream = upstream_for(inputs)
    want = with_gradients(byte_pool, inputs, upstream, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(inputs["byte_ids"])
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs["byte_ids"])
        got = with_gradients(byte_pool, {**inputs, "byte_ids": late}, upstream, impl="triton")
    stream.synchronize()
    assert_same(got, want)


@ON_GPU
def test_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    first, second = on_cuda(index=0), on_cuda(index=1)
    upstream = upstream_for(first)
    want = with_gradients(byte_pool, first, upstream, impl="triton")
    got = with_gradients(byte_pool, second, upstream.to("cuda:1"), impl="triton")
    assert got["out"].device == torch.device("cuda:1")
    assert_same(got, want)
