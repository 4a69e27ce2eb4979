"""Segments longer than a part, which launches of their own add up: every op that sums segments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.lanes import Way
from helpers.tensors import ints
from torch import Tensor

from stlm_kernels import _launch, byte_pool, segment_pool, unpool
from stlm_kernels.testing import GuardBand, poisoned_memory

EVERY_LANE = pytest.mark.lanes("cpu", "interpret", "gpu")
PART = 8
SMALL_PARTS = {
    "segment_sum_long": {"PART_ROWS": PART, "BLOCK_T": 4},
    "long_segments": {"PARTS": 4, "BLOCK_S": 2},
    "segment_pool_pick": {"PART_ROWS": PART},
    "segment_pool_pick_long": {"BLOCK_T": 2},
    "byte_pool_fwd": {"PART_ROWS": PART},
    "byte_pool_fwd_product": {"PART_ROWS": PART, "BLOCK_P": 16},
}
LENGTHS = {
    "one": [5 * PART + 3],
    "a part and one row": [PART + 1],
    "parts exactly": [2 * PART, PART, 3 * PART],
    "behind each other": [3, 2 * PART, 0, 4 * PART + 1, 0, 0, 2 * PART - 1, 1],
    "short beside long": [PART, 1, PART + 1, PART - 1, 2, 3 * PART, 1, 1],
    "few": [PART, 0, PART - 1],
}
TAIL = 3


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def summed(x: Tensor, lengths: list[int], mean: bool) -> Tensor:
    parts = x[: sum(lengths)].double().split(lengths)
    return torch.stack([p.mean(0) if mean and len(p) else p.sum(0) for p in parts])


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 8 * torch.finfo(found.dtype).eps
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=tolerance * scale)


def each_twice(run: Callable[[], Tensor]) -> Tensor:
    """Result in small parts; the second must have the same bits."""
    with _launch.overriding(SMALL_PARTS), poisoned_memory():
        first, second = run(), run()
    assert torch.equal(first.nan_to_num(nan=7), second.nan_to_num(nan=7))
    return first


@EVERY_LANE
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segment_pool(lengths: list[int], mode: str, way: Way) -> None:
    x = GuardBand(torch.randn(sum(lengths) + TAIL, 3).to(way.device, way.dtype)).tensor
    cu = offsets_of(lengths).to(way.device)
    found = each_twice(lambda: segment_pool(x, cu, mode=mode, impl=way.impl))
    close(found, summed(x.cpu(), lengths, mode == "mean"))


@EVERY_LANE
@pytest.mark.one_dtype
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("values", ["ties", "numbers", "NaN", "infinities"])
def test_maximum_and_minimum(values: str, mode: str, way: Way) -> None:
    """The first of equals, and the first NaN, take the gradient across parts too."""
    lengths = LENGTHS["behind each other"]
    x = torch.randn(sum(lengths) + TAIL, 3)
    if values == "ties":
        x = torch.randint(0, 2, x.shape).float()
    if values == "NaN":
        x[torch.rand(x.shape) < 0.1] = torch.nan
    if values == "infinities":
        x = x.sign() * torch.inf
    leaf = x.to(way.device, way.dtype).requires_grad_()
    cu = offsets_of(lengths).to(way.device)
    out = each_twice(lambda: segment_pool(leaf, cu, mode=mode, impl=way.impl))
    with _launch.overriding(SMALL_PARTS):
        out = segment_pool(leaf, cu, mode=mode, impl=way.impl)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    for j, part in enumerate(x[: sum(lengths)].split(lengths)):
        if not len(part):
            assert not out[j].any()
            continue
        nan = part.isnan()
        best = part.amax(0) if mode == "max" else part.amin(0)
        row = torch.where(nan.any(0), nan, part == best).int().argmax(0)
        torch.testing.assert_close(out[j].cpu(), part[row, torch.arange(3)], equal_nan=True)
        wanted = torch.zeros_like(part).scatter_(0, row[None], 1.0)
        begin = sum(lengths[:j])
        assert torch.equal(gradient[begin : begin + len(part)].cpu(), wanted)


@EVERY_LANE
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradient_of_unpool(lengths: list[int], way: Way) -> None:
    """Runs in any order, and rows that read nothing between and behind them."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    reads = torch.cat(
        [x for j in order for x in (ints(-1), torch.full((lengths[j],), j, dtype=torch.int32))]
        + [ints(-1, -1)]
    ).to(way.device)
    states = torch.randn(len(lengths), 3, dtype=way.dtype, device=way.device).requires_grad_()
    upstream = torch.randn(reads.shape[0], 3).to(way.device, way.dtype)

    def run() -> Tensor:
        out = unpool(states, reads, impl=way.impl)
        return torch.autograd.grad(out, states, upstream)[0]

    rows = [upstream.cpu()[(reads == j).cpu()].double().sum(0) for j in range(len(lengths))]
    close(each_twice(run), torch.stack(rows))


@EVERY_LANE
@pytest.mark.parametrize("slots", [None, 20])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("name", ["one", "behind each other", "short beside long"])
def test_byte_pool(name: str, mode: str, slots: int | None, way: Way) -> None:
    """The place of a byte in its patch counts from the patch's beginning, not from the part's."""
    lengths = LENGTHS[name]
    ids = torch.randint(0, 256, (sum(lengths) + TAIL,), dtype=torch.uint8)
    weight = torch.randn(256, 3).to(way.dtype)
    gain = None
    rows = weight.double()[ids.long()]
    if slots is not None:
        gain = torch.randn(slots, 3).to(way.dtype)
        place = torch.cat([torch.arange(n) for n in [*lengths, TAIL]]).clamp(max=slots - 1)
        rows = rows * gain.double()[place]
    ids, weight = ids.to(way.device), weight.to(way.device)
    gain = None if gain is None else gain.to(way.device)
    cu = offsets_of(lengths).to(way.device)
    found = each_twice(
        lambda: byte_pool(ids, weight, cu, mode=mode, position_weight=gain, impl=way.impl)
    )
    close(found, summed(rows, lengths, mode == "mean"))


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.one_dtype
def test_a_bad_id_reaches_its_long_patch_alone(way: Way) -> None:
    lengths = [2, 3 * PART, 2 * PART, 1]
    ids = torch.randint(0, 9, (sum(lengths),), dtype=torch.int32)
    weight, cu = torch.randn(9, 3), offsets_of(lengths)
    ids[2 + 2 * PART] = 9

    @torch.compile(backend="eager")  # values are not looked at
    def run() -> Tensor:
        return byte_pool(
            ids.to(way.device), weight.to(way.device), cu.to(way.device), impl=way.impl
        )

    with _launch.overriding(SMALL_PARTS):
        assert run().isnan().all(1).tolist() == [False, True, False, False]


@pytest.mark.lanes("interpret", "gpu")
@pytest.mark.one_dtype
def test_short_texts_take_no_more_launches(way: Way) -> None:
    """No text can hold a patch longer than itself."""
    x, cu = torch.randn(20, 3, device=way.device), ints(0, 20).to(way.device)
    launches: list[str] = []
    with _launch.recording(lambda kernel, *_: launches.append(kernel.fn.__name__)):
        segment_pool(x, cu, mode="sum", impl="triton")
    assert launches == ["stlm_segment_sum"]
