"""Kernels that ops share, by themselves: sums of splits, sums of segments."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.lanes import Way
from torch import Tensor

from stlm_kernels.testing import GuardBand, assert_matches, poisoned_memory

pytestmark = pytest.mark.lanes("interpret", "gpu")


def guarded(x: Tensor, way: Way) -> Tensor:
    """Place x between NaN, which shows where something behind a mask was read."""
    return GuardBand(x.to(way.device)).tensor


@pytest.mark.parametrize("splits", [0, 1, 2, 31, 32, 33, 96, 103])
def test_sum_of_splits(splits: int, way: Way) -> None:
    """The last tiles of splits and of results are ragged; a NaN reaches its own result alone."""
    from stlm_kernels._triton.tiles import sum_splits

    partial = torch.randn(splits, 3, 43)
    with poisoned_memory():
        out = sum_splits(guarded(partial, way), way.dtype).cpu()
    assert_matches(out, partial.double().sum(0), partial.sum(0).to(way.dtype))
    if splits:
        partial[-1, 1, 2] = math.nan
        again = sum_splits(guarded(partial, way), way.dtype).cpu()
        assert again.isnan().nonzero().tolist() == [[1, 2]]
        assert torch.equal(again.nan_to_num(nan=float(out[1, 2])), out)


@pytest.mark.parametrize("splits", [(0, 33), (96, 2), (7, 7)])
def test_sums_of_two_in_one_launch(splits: tuple[int, int], way: Way) -> None:
    """Compare each with its own launch; what is not wanted is empty."""
    from stlm_kernels._triton.tiles import sum_each, sum_splits

    partials = [torch.randn(splits[0], 3, 43), torch.randn(splits[1], 700)]
    given = [guarded(x, way) for x in partials]
    dtypes = [way.dtype, torch.float32]
    with poisoned_memory():
        found = [x.cpu() for x in sum_each(given, dtypes)]
        second = sum_each(given, dtypes, (False, True))
    for x, dtype, got in zip(partials, dtypes, found, strict=True):
        assert_matches(got, x.double().sum(0), x.sum(0).to(dtype))
    assert second[0].shape == (0,)
    assert torch.equal(second[1].cpu(), sum_splits(given[1], torch.float32).cpu())
    assert all(not x.numel() for x in sum_each(given, dtypes, (False, False)))
