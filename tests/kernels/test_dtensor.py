"""Rows of a loss as DTensors on two processes, equal to one process: both implementations."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.fast_interpreter import interpret_fast
from helpers.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute

from stlm_kernels import linear_cross_entropy, linear_kl_div, linear_logprobs, linear_sample

ROWS, WIDTH = 13, 8  # not equal shares
VOCABS = {"torch": (40,), "triton": (40, 520)}  # on the chip, and in chunks
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def data(vocab: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(*shape, generator=rng) for shape in ((ROWS, WIDTH), (vocab, WIDTH), (vocab,))
    )
    target = torch.randint(0, vocab, (ROWS,), generator=rng)
    target[:4] = -100  # the processes count different numbers of rows
    return [hidden, weight, bias, target]


def losses(impl: str) -> dict[str, Loss]:
    def cross_entropy(reduction: str, **options: Any) -> Loss:
        def loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, reduction=reduction, impl=impl, **options
            )

        return loss

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        logprob, lse = linear_logprobs(hidden, weight, target, linear_bias=bias, impl=impl)
        return (2 * lse - logprob).sum()

    def weighted(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        """Class weights, which are whole as the bias is, and the lse of each row."""
        classes = bias.detach().abs()
        loss, lse = cross_entropy("mean", weight=classes, return_lse=True, label_smoothing=0.1)(
            hidden, weight, bias, target
        )
        return loss + lse.square().sum()

    return {
        "sum": cross_entropy("sum"),
        "mean": cross_entropy("mean", label_smoothing=0.1),
        "none": lambda *tensors: cross_entropy("none")(*tensors).square().sum(),
        "logprobs": logprobs,
        "weighted mean": weighted,
    }


def with_gradients(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    *leaves, target = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = loss(*leaves, target)
    value.backward()
    return value.detach(), [x.grad for x in leaves]


def as_dtensors(tensors: list[Tensor], mesh: DeviceMesh, rows: list[Placement]) -> list[Tensor]:
    whole = [Replicate()] * mesh.ndim
    return [distribute(x, mesh, rows if len(x) == ROWS else whole) for x in tensors]


@functools.cache
def by_one_process(impl: str, vocab: int, name: str) -> tuple[Tensor, list[Tensor]]:
    return with_gradients(losses(impl)[name], data(vocab))


def divided_rows_equal_one_process(
    impl: str, vocabs: tuple[int, ...], mesh: DeviceMesh, rows: list[Placement]
) -> None:
    for vocab in vocabs:
        tensors = data(vocab)
        for name, loss in losses(impl).items():
            want, want_grads = by_one_process(impl, vocab, name)
            got, grads = with_gradients(loss, as_dtensors(tensors, mesh, rows))
            where = f"{impl}, V = {vocab}, {name}"
            for shared, whole in zip([got, *grads], [want, *want_grads], strict=True):
                off = (shared.full_tensor() - whole).abs().max()
                assert off <= 1e-6 * whole.abs().max(), where
            summed = tuple(Partial() if p.is_shard() else p for p in rows)
            assert [x.placements for x in grads] == [tuple(rows), summed, summed], where
            if name == "sum":
                assert got.placements == summed, where


def what_does_not_fit_is_refused(impl: str, mesh: DeviceMesh) -> None:
    tensors = data(40)
    hidden, weight, bias, target = as_dtensors(tensors, mesh, [Shard(0)])
    by_column = distribute(tensors[0], mesh, [Shard(1)])
    by_row = distribute(tensors[1], mesh, [Shard(0)])
    whole = "input's mesh with placements (Replicate(),)"
    loss = losses(impl)["sum"]
    for call, message in (
        (lambda: loss(by_column, weight, bias, target), "input: expected a DTensor whose every"),
        (
            lambda: loss(hidden, by_row, bias, target),
            f"linear_weight: expected a DTensor on {whole}",
        ),
        (lambda: loss(hidden, weight, tensors[2], target), "got a plain Tensor"),
        (lambda: loss(tensors[0], weight, tensors[2], tensors[3]), "expected a plain Tensor, got"),
        (lambda: linear_sample(hidden, weight), "input: expected a plain Tensor, got a DTensor"),
        (lambda: linear_kl_div(hidden, weight, weight), "input: expected a plain Tensor, got"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def rank(index: int, impl: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    assert isinstance(distribute(torch.zeros(2), mesh), DTensor)
    if impl == "triton":
        interpret_fast(pytest.MonkeyPatch())  # a process of its own, without fixtures
    vocabs = VOCABS[impl]
    divided_rows_equal_one_process(impl, vocabs, mesh, [Shard(0)])
    two_axes = init_device_mesh("cpu", (1, 2))
    divided_rows_equal_one_process(impl, vocabs[:1], two_axes, [Replicate(), Shard(0)])
    what_does_not_fit_is_refused(impl, mesh)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    "impl",
    [
        pytest.param("torch", marks=pytest.mark.lanes("cpu")),
        pytest.param("triton", marks=pytest.mark.lanes("interpret")),
    ],
)
def test_rows_as_dtensors(impl: str, tmp_path: Path) -> None:
    run_ranks(rank, tmp_path, impl)
