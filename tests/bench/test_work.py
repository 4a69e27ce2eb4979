"""Work in proportion to rows: what the torch paths make, counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.ops import ElementsMade
from torch import Tensor

import stlm_kernels as ops

FEW, MANY = 100, 400
MOST = 1.3
"""Elements for each row, of many documents beside few; those of quadratic work are 4 to 1."""
POOLS = ("mean", "sum", "max", "min", "first", "last")


def packed(documents: int, shortest: int = 65) -> tuple[Tensor, int]:
    """Documents of many lengths, and how many rows they have."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, 7 * shortest, (documents,), generator=rng)
    boundaries = torch.cat([lengths.new_zeros(1), lengths]).cumsum(0).int()
    return boundaries, int(boundaries[-1])


def operands(rows: int, heads: int = 2, width: int = 4) -> list[Tensor]:
    shapes = (rows, heads, width), (rows, 1, width), (rows, 1, width)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def differentiate(out: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def attend(shortest: int = 65, **options: Any) -> Callable[[int], int]:
    def run(documents: int) -> int:
        boundaries, rows = packed(documents, shortest)
        leaves = operands(rows)
        differentiate(ops.attention(*leaves, cu_seqlens=boundaries, **options), leaves)
        return rows

    return run


def attend_twice(documents: int) -> int:
    boundaries, rows = packed(documents, 9)
    leaves = operands(rows)
    out = ops.attention(*leaves, cu_seqlens=boundaries)
    first = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    torch.autograd.grad([x.sum() for x in first], leaves)
    return rows


def attend_to_patches(causal: bool) -> Callable[[int], int]:
    def run(documents: int) -> int:
        boundaries, rows = packed(documents)
        leaves = operands(rows)
        differentiate(
            ops.patch_attention(leaves[0], leaves[1], leaves[2], boundaries, causal=causal), leaves
        )
        return rows

    return run


def attend_to_poison(documents: int) -> int:
    boundaries, rows = packed(documents, 9)
    leaves = operands(rows)
    with torch.no_grad():
        leaves[1][3] = torch.nan
    differentiate(ops.attention(*leaves, cu_seqlens=boundaries), leaves)
    return rows


def decode(documents: int) -> int:
    lens = torch.arange(documents, dtype=torch.int32) % 97 + 1
    cache = torch.randn(documents, 100, 1, 4)
    ops.decode_attention(torch.randn(documents, 2, 4), cache, cache, lens)
    return documents


def pool(mode: str) -> Callable[[int], int]:
    def run(documents: int) -> int:
        boundaries, rows = packed(documents)
        x = torch.randn(rows, 4, requires_grad=True)
        differentiate(ops.segment_pool(x, boundaries, mode=mode), [x])
        return rows

    return run


def pool_attentively(documents: int) -> int:
    boundaries, rows = packed(documents)
    leaves = [torch.randn(2, 4, requires_grad=True), *operands(rows)[1:]]
    differentiate(ops.attention_pool(leaves[0], leaves[1], leaves[2], boundaries), leaves)
    return rows


def smooth(documents: int) -> int:
    boundaries, rows = packed(documents)
    leaves = [torch.randn(rows, 4, requires_grad=True), torch.rand(rows, requires_grad=True)]
    read = torch.arange(rows, dtype=torch.int32)
    differentiate(ops.ema_unpool(leaves[0], leaves[1], read, cu_seqlens=boundaries), leaves)
    return rows


def embed(documents: int) -> int:
    boundaries, rows = packed(documents)
    table = torch.randn(50, 4, requires_grad=True)
    ids = torch.randint(0, 256, (rows,), dtype=torch.uint8)
    out = ops.ngram_embedding(ids, [table], ngram_sizes=(2,), cu_seqlens=boundaries)
    differentiate(out, [table])
    return rows


def cut(documents: int) -> int:
    boundaries, rows = packed(documents)
    ids = torch.randint(0, 256, (rows,), dtype=torch.uint8)
    ops.find_patches(ids, rule="space", cu_seqlens=boundaries)
    return rows


WORK = {
    "attention": attend(),
    "attention of both sides": attend(causal=False),
    "attention in a window": attend(window=20),
    "attention with a softcap": attend(9, softcap=2.0),
    "attention near NaN": attend_to_poison,
    "attention twice differentiated": attend_twice,
    "patch_attention": attend_to_patches(False),
    "causal patch_attention": attend_to_patches(True),
    "decode_attention": decode,
    **{f"segment_pool {mode}": pool(mode) for mode in POOLS},
    "attention_pool": pool_attentively,
    "ema_unpool": smooth,
    "ngram_embedding": embed,
    "find_patches": cut,
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_work_grows_with_rows(work: Callable[[int], int]) -> None:
    per_row = []
    for documents in (FEW, MANY):
        with ElementsMade() as made:
            rows = work(documents)
        per_row.append(made.elements / rows)
    assert per_row[1] <= MOST * per_row[0]


def test_quadratic_work_is_seen() -> None:
    """The measure sees slices, whose gradients autograd pads to the whole."""

    def slices(documents: int) -> int:
        boundaries, rows = packed(documents)
        x = torch.randn(rows, 4, requires_grad=True)
        parts = [x[a:b] * 2 for a, b in pairwise(boundaries.tolist())]
        differentiate(torch.cat(parts), [x])
        return rows

    with pytest.raises(AssertionError):
        test_work_grows_with_rows(slices)
