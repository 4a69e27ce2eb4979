"""Stacks of matrices for Muon: every matrix once, beside those of its shape, padded where told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stlm_models.training import stacks as of
from stlm_models.training.stacks import Shape, Stack, map_stacked, stacks

SHAPES: list[Shape] = [(3, 5), (5, 3), (3, 5), (2, 2), (4, 1), (2, 5), (1, 0)]


def halved(stack: Tensor) -> Tensor:
    """Half of each: zeros stay zeros, a transpose gives the transpose."""
    return (stack / 2).bfloat16()


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("limit", [1, 40, 2**23])
def test_each_matrix_is_changed_once(
    pads: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of, "STACK_ELEMENTS", limit)
    matrices = [torch.randn(shape) for shape in SHAPES]
    changed = map_stacked(matrices, halved, pads=pads)
    for got, matrix in zip(changed, matrices, strict=True):
        assert got.dtype == matrix.dtype
        assert got.is_contiguous()
        assert torch.equal(got, halved(matrix).float())


def test_shapes_stand_together_however_they_lie() -> None:
    found = stacks(SHAPES, pads=False)
    assert sorted(stack.shape for stack in found) == [(0, 1), (1, 4), (2, 2), (2, 5), (3, 5)]
    (largest,) = (stack for stack in found if stack.shape == (3, 5))
    assert largest.places == {(3, 5): [0, 2], (5, 3): [1]}


def test_padding_joins_small_matrices() -> None:
    (joined,) = stacks(SHAPES, pads=True)
    assert joined.shape == (3, 5)
    assert joined.count == len(SHAPES)


def test_padding_ends_where_zeros_cost_more_than_a_stack() -> None:
    large: list[Shape] = [(2048, 8192)] * 2
    assert len({stack.shape for stack in stacks([*large, (512, 512)], pads=True)}) == 2
    few, many = [(256, 256)] * 2, [(256, 256)] * 2000
    assert len(stacks([(256, 1024), *few], pads=True)) == 1
    assert len({stack.shape for stack in stacks([(256, 1024), *many], pads=True)}) == 2


def test_the_operations_of_a_stack() -> None:
    """Three products an iteration: X X^T, its square, and that times X."""
    one = Stack({(2, 3): [0, 1]}, (2, 3))
    products = 2 * (2 * 3 * 2) + 2 * (2 * 2 * 2) + 2 * (2 * 2 * 3)
    assert one.flops == 5 * 2 * products
