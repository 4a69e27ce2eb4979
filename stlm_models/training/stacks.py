"""Stacks of matrices that are orthogonalised together: few large products, not many small ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GPU_ELEMENTS, CPU_ELEMENTS = 2**23, 2**20
"""The most elements that are orthogonalised together, which bounds the memory of a step: on a GPU
as many as fill it, on a CPU as few as stay in its caches."""
PADDING_FLOPS = 2**35
"""The most operations on zeros that a stack less is worth: about 50 us of an H100's, as long as the
30 launches that a stack costs."""

ITERATIONS = 5
"""Newton-Schulz iterations of a step of Muon."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """Places of matrices in a list by their shapes, and the shape, rows <= columns, of all."""

    places: dict[Shape, list[int]]
    shape: Shape

    @property
    def count(self) -> int:
        return sum(map(len, self.places.values()))

    @property
    def is_padded(self) -> bool:
        return any((min(shape), max(shape)) != self.shape for shape in self.places)

    @property
    def flops(self) -> int:
        """Operations of Muon's iterations, all matrices padded to the shape."""
        rows, columns = self.shape
        return ITERATIONS * self.count * (4 * rows * rows * columns + 2 * rows**3)

    def with_all(self, other: Stack) -> Stack:
        """Return the stack of the matrices of both."""
        rows, columns = (max(sizes) for sizes in zip(self.shape, other.shape, strict=True))
        return Stack(self.places | other.places, (rows, columns))


def map_stacked(
    matrices: list[Tensor],
    change: Callable[[Tensor], Tensor],  # (..., M, N) -> the same, zeros staying zeros
    *,
    on_gpu: bool,
) -> list[Tensor]:
    """Return what `change` makes of each matrix, in its dtype, from stacks with M <= N.

    Args:
        matrices: of one dtype and device.
        change: gives of a matrix's transpose the transpose, and of one among zeros the same.
        on_gpu: as in `stacks`.
    """
    found: dict[int, Tensor] = {}
    for stack in stacks([(x.shape[0], x.shape[1]) for x in matrices], on_gpu=on_gpu):
        if stack.count == 1:
            ((place,),) = stack.places.values()
            found[place] = _standing(change(_lying(matrices[place])), matrices[place])
            continue
        new = matrices[0].new_zeros if stack.is_padded else matrices[0].new_empty
        whole = new((stack.count, *stack.shape))
        for part, places in _parts(whole, stack):
            torch.stack([matrices[i] for i in places], out=part)
        for part, places in _parts(change(whole), stack):
            own = part.to(matrices[0].dtype, memory_format=torch.contiguous_format)
            found |= zip(places, own, strict=True)
    return [found[i] for i in range(len(matrices))]


def _parts(whole: Tensor, stack: Stack) -> Iterator[tuple[Tensor, list[int]]]:
    """Views of the matrices of each shape, as they lie in the list, and their places."""
    begin = 0
    for (rows, columns), places in stack.places.items():
        end = begin + len(places)
        if rows > columns:
            yield whole[begin:end, :columns, :rows].mT, places
        else:
            yield whole[begin:end, :rows, :columns], places
        begin = end


def _lying(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _standing(changed: Tensor, matrix: Tensor) -> Tensor:
    turned = changed if changed.shape == matrix.shape else changed.mT
    return turned.to(matrix.dtype, memory_format=torch.contiguous_format)


def stacks(shapes: list[Shape], *, on_gpu: bool) -> list[Stack]:
    """Divide matrices of these shapes into stacks, those of one shape or its transpose together.

    Args:
        shapes: of the matrices.
        on_gpu: a stack costs launches there, so stacks are larger, and shapes that differ share one
            where zeros around them cost less than they save.
    """
    found: dict[Shape, Stack] = {}
    for i, shape in enumerate(shapes):
        lying = (min(shape), max(shape))
        stack = found.setdefault(lying, Stack({}, lying))
        stack.places.setdefault(shape, []).append(i)
    whole = sorted(found.values(), key=lambda stack: stack.shape)
    elements = GPU_ELEMENTS if on_gpu else CPU_ELEMENTS
    merged = _merged(whole) if on_gpu else whole
    return [part for stack in merged for part in _cut(stack, elements)]


def _merged(parts: list[Stack]) -> list[Stack]:
    """Join stacks, the cheapest two at a time, while the zeros cost less than a stack."""
    parts = list(parts)
    while len(parts) > 1:
        cost, i, j = min(
            (parts[i].with_all(parts[j]).flops - parts[i].flops - parts[j].flops, i, j)
            for i in range(len(parts))
            for j in range(i)
        )
        if cost > PADDING_FLOPS:
            break
        joined = parts[i].with_all(parts[j])
        parts = [x for k, x in enumerate(parts) if k not in (i, j)] + [joined]
    return parts


def _cut(stack: Stack, elements: int) -> Iterator[Stack]:
    """Cut a stack into such as have no more elements, or one matrix."""
    most = max(1, elements // max(1, math.prod(stack.shape)))
    every = [(shape, i) for shape, places in stack.places.items() for i in places]
    for begin in range(0, len(every), most):
        places: dict[Shape, list[int]] = {}
        for shape, i in every[begin : begin + most]:
            places.setdefault(shape, []).append(i)
        yield Stack(places, stack.shape)
