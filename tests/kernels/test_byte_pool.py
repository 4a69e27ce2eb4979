"""byte_pool beyond what every op owes: values and gradients, NaN, planted mutations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.byte_pool import (
    ON_CPU,
    RESULT_LANES,
    assert_right,
    interpreted,
    looped,
    pool_inputs,
    unseen,
    upstream_for,
    with_gradients,
)
from helpers.lanes import BF16, FP16, FP32, Way
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stlm_kernels import _launch, byte_pool
from stlm_kernels.ops.byte_pool.reference import yardstick
from stlm_kernels.spec import Inputs
from stlm_kernels.spec_inputs import text_bytes
from stlm_kernels.testing import assert_matches

SMALL_TILES = {
    "byte_pool_fwd": {"BLOCK_D": 16, "PATCHES": 4, "num_warps": 4},
    "byte_pool_fwd_product": {"BLOCK_D": 16, "BLOCK_P": 16, "PROGRAMS": 4, "num_warps": 4},
    "byte_pool_bwd": {
        "BLOCK_V": 32, "BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 4096, "num_warps": 4,
    },
    "byte_pool_bwd_gain": {
        "BLOCK_V": 16, "BLOCK_P": 16, "BLOCK_D": 16, "PROGRAMS": 4096, "num_warps": 4,
    },
}  # fmt: skip
"""Many programs and a split for every 16 patches, at sizes that an interpreter can walk."""


# ---- values and gradients ---------------------------------------------------------------------


@RESULT_LANES
def test_the_gradient_of_an_id_behind_the_bytes(way: Way) -> None:
    """A row of the table's last tile, which one byte of one patch among many hits."""
    ids = torch.full((600,), 7, dtype=torch.int16)
    ids[341] = 256
    weight = torch.ones(257, 16, device=way.device, dtype=way.dtype, requires_grad=True)
    cu = torch.arange(0, 601, 3, dtype=torch.int32, device=way.device)
    out = byte_pool(ids.to(way.device), weight, cu, mode="sum", impl=way.impl)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad[256].tolist() == [1.0] * 16
    assert float(weight.grad.abs().sum(1)[7:256].count_nonzero()) == 1


@pytest.mark.lanes("interpret", "compiled", "gpu")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_ids_begin_and_end_off_whole_words(way: Way, dtype: torch.dtype, skipped: int) -> None:
    """Kernels read ids by words of 4 bytes: none of a neighbour may count, wherever ids begin."""
    for length in (37, 38, 39, 40):
        inputs = pool_inputs([length - 20, 7, 0, 13], way, vocab=256, width=16, ids=dtype)
        around = torch.full((length + 8,), 255, dtype=dtype, device=way.device)
        around[skipped : skipped + length] = inputs["byte_ids"]
        inputs["byte_ids"] = around[skipped : skipped + length]
        assert_right(inputs, way.impl)


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
        # One bf16 part of scale * G is within the rule on a table, not on any single number:
        # a patch "aaa" has the gradient 3 * (g / 3), which plain torch happens to get exactly.
        lengths, width, vocab = [*lengths, *range(1, 40)], max(width, 16), max(vocab, 64)
    if sum(lengths) > 64:
        # A long sum of one number drifts, in plain torch and the loop too: that compares luck.
        width, vocab = max(width, 16), max(vocab, 64)
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
def test_patches_longer_than_a_bf16_count(way: Way, mode: str) -> None:
    """Counts above 256 are no bf16 numbers: parts of a long patch must all arrive, each once."""
    if interpreted(way) and mode == "mean":
        pytest.skip("slow in the interpreter")
    longest = 270 if interpreted(way) else 530
    inputs = pool_inputs([longest, 3, 257, 0], way, vocab=5, width=3, mode=mode)
    inputs["byte_ids"][:longest] = 2
    assert_right(inputs, way.impl)


@RESULT_LANES
@pytest.mark.parametrize("programs", [1, 4096])
def test_long_patches_among_short_ones(way: Way, programs: int) -> None:
    """Tiles of one long patch, the tiles around it, and shares that begin and end inside it."""
    lengths = [2, 0, 260, 5, 257, 1]
    if not interpreted(way):
        lengths += [256, 9_000, 3, 0, 2_049, 2_048]
    inputs = pool_inputs(lengths, way, tail=2, width=3)
    small = SMALL_TILES["byte_pool_bwd"] | {"PROGRAMS": programs}
    with _launch.overriding({"byte_pool_bwd": small}):
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
    found = byte_pool(**alone, impl=way.impl)
    torch.testing.assert_close(found, together[2:4])
    if way.impl == "triton":  # sums run in one order, whatever lies beside them
        assert torch.equal(found, together[2:4])


@pytest.mark.lanes("cpu", "gpu")
def test_more_patches_than_a_grid_dimension(way: Way) -> None:
    """70,001 patches of at most one byte, so that the right answer is a plain lookup.

    Not in the interpreter, which has no such limit and takes a millisecond for each.
    """
    if way.dtype not in (FP32, FP16):
        pytest.skip("two dtypes show what indexing does")
    patches = 70_001
    inputs = pool_inputs([1] * patches, way, vocab=9, width=2)
    got = with_gradients(byte_pool, inputs, torch.ones(patches, 2), impl=way.impl)
    ids = inputs["byte_ids"].long()
    assert torch.equal(got["out"], inputs["weight"][ids])
    counts = torch.bincount(ids, minlength=9)[:, None].to(way.dtype)
    assert torch.equal(got["weight"], counts.expand(9, 2))


SHORT_PARTS = {key: {"PART_ROWS": 128} for key in ("byte_pool_fwd", "byte_pool_fwd_product")}


@pytest.mark.lanes("compiled", "gpu")
@pytest.mark.parametrize(
    ("ids_dtype", "vocab", "offset", "width"),
    [
        (torch.uint8, 256, 0, 20),
        (torch.int32, 258, 1, 21),
        (torch.uint8, 513, 0, 20),
        (torch.uint8, 513, 1, 20),
        (torch.int32, 513, 0, 256),
    ],
)
def test_exact_sums(ids_dtype: torch.dtype, vocab: int, offset: int, width: int) -> None:
    """Sums of small integers: by counts, or by rows, which may be read as pairs of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.randint(-9, 9, (vocab * width + 1,), device=device).to(BF16)
    table = numbers[offset : offset + vocab * width].view(vocab, width)
    used = min(vocab, 256) if ids_dtype == torch.uint8 else vocab
    ids = torch.randint(0, used, (400,), device=device).to(ids_dtype)
    # Short ones, one that has a tile for itself, one that is cut.
    ends = [0, 1, 1, 9, 70, 140, 360, 400]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    with _launch.overriding(SHORT_PARTS):
        out = byte_pool(ids, table, offsets, mode="sum", impl="triton")
    rows = table.float()[ids.long()]
    sums = [rows[a:b].sum(0) for a, b in pairwise(ends)]
    assert torch.equal(out, torch.stack(sums).to(BF16))


@pytest.mark.lanes("compiled", "gpu")
@pytest.mark.parametrize(("row", "value"), [(200, float("nan")), (256, float("inf"))])
def test_what_is_not_finite_stays_in_its_patches(row: int, value: float) -> None:
    """A product would spread it, since 0 x NaN is NaN; patches of every length of `launch_fwd`.

    The kernels are those of a case above.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.ones(258 * 21 + 1, device=device, dtype=BF16)[1:].view(258, 21)
    table[row, 1] = value
    ids = torch.ones(400, dtype=torch.int32, device=device)
    ends = [0, 1, 3, 3, 100, 101, 357, 359, 400]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    for held in ((0, 3), (1, 4, 5)):
        ids[:] = 1
        ids[[ends[patch] for patch in held]] = row
        with _launch.overriding(SHORT_PARTS):
            out = byte_pool(ids, table, offsets, mode="sum", impl="triton")
        want = offsets.diff()[:, None].expand(-1, 21).to(BF16).cpu()
        want[[x for x in held if ends[x + 1] > ends[x]], 1] = value
        torch.testing.assert_close(out.cpu(), want, equal_nan=True, rtol=0, atol=0)


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
    inputs["position_weight"] = 1 + torch.randn(4, 24, device=way.device) / 2
    assert_right(inputs, way.impl)
    rounded = {**inputs, "position_weight": inputs["position_weight"].to(way.dtype)}
    assert torch.equal(byte_pool(**inputs, impl=way.impl), byte_pool(**rounded, impl=way.impl))


# ---- NaN and what belongs to no patch ---------------------------------------------------------


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


def one_less(boundaries: Tensor) -> Tensor:
    return torch.cat([boundaries[:1], (boundaries[1:] - 1).clamp(0)])


def emptied(boundaries: Tensor) -> Tensor:
    """The last patch holds nothing."""
    return torch.cat([boundaries[:-1], boundaries[-2:-1]])


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
    yard = with_gradients(yardstick, inputs, upstream)
    right = with_gradients(byte_pool, inputs, upstream)

    def judge(found: dict[str, Tensor]) -> None:
        for name, x in found.items():
            assert_matches(x, want[name], yard[name], name=name, rows=name == "weight")

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
