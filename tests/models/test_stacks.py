"""Stacks of matrices for Muon: every matrix once, beside those of its shape, padded where told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stlm_models.training import stacks as of
from stlm_models.training.stacks import Shape, Stack, map_stacked, stacks

SHAPES: list[Shape] = [(3, 5), (5, 3), (3, 5), (2, 2), (4, 1), (2, 5), (1, 0)]


def halved(stack: Tensor) -> Tensor:
    """Half of each: zeros stay zeros, a transpose gives the transpose."""
    return (stack / 2).bfloat16()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("limit", [1, 40, 2**23])
def test_each_matrix_is_changed_once(
    on_gpu: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of, "GPU_ELEMENTS" if on_gpu else "CPU_ELEMENTS", limit)
    matrices = [torch.randn(shape) for shape in SHAPES]
    changed = map_stacked(matrices, halved, on_gpu=on_gpu)
    for got, matrix in zip(changed, matrices, strict=True):
        assert got.dtype == matrix.dtype
        assert got.is_contiguous()
        assert torch.equal(got, halved(matrix).float())


def test_shapes_stand_together_however_they_lie() -> None:
    found = stacks(SHAPES, on_gpu=False)
    assert sorted(stack.shape for stack in found) == [(0, 1), (1, 4), (2, 2), (2, 5), (3, 5)]
    (largest,) = (stack for stack in found if stack.shape == (3, 5))
    assert largest.places == {(3, 5): [0, 2], (5, 3): [1]}


def test_padding_joins_small_matrices() -> None:
    (joined,) = stacks(SHAPES, on_gpu=True)
    assert joined.shape == (3, 5)
    assert joined.count == len(SHAPES)


def test_padding_ends_where_zeros_cost_more_than_a_stack() -> None:
    large: list[Shape] = [(2048, 8192)] * 2
    assert len({stack.shape for stack in stacks([*large, (512, 512)], on_gpu=True)}) == 2
    few, many = [(256, 256)] * 2, [(256, 256)] * 2000
    assert len(stacks([(256, 1024), *few], on_gpu=True)) == 1
    assert len({stack.shape for stack in stacks([(256, 1024), *many], on_gpu=True)}) == 2


@pytest.mark.parametrize(("on_gpu", "limit"), [(True, of.GPU_ELEMENTS), (False, of.CPU_ELEMENTS)])
def test_a_stack_has_no_more_elements_than_its_device_takes(on_gpu: bool, limit: int) -> None:
    shapes: list[Shape] = [(256, 1024)] * 40 + [(4096, 4096)]
    found = stacks(shapes, on_gpu=on_gpu)
    assert sum(stack.count for stack in found) == len(shapes)
    sizes = [(stack.count, stack.count * math.prod(stack.shape)) for stack in found]
    assert all(count == 1 or size <= limit for count, size in sizes)
    assert max(size for count, size in sizes if count > 1) == limit


def test_the_operations_of_a_stack() -> None:
    """Three products an iteration: X X^T, its square, and that times X."""
    one = Stack({(2, 3): [0, 1]}, (2, 3))
    products = 2 * (2 * 3 * 2) + 2 * (2 * 2 * 2) + 2 * (2 * 2 * 3)
    assert one.flops == 5 * 2 * products
