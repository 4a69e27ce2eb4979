"""Tensors that many tests are made of: prefix sums, leaves, operands of the projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from helpers.lanes import Way
from stlm_kernels.testing import assert_matches


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return random values that require gradients, the same in every dtype but for the cast."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def normal(*shapes: tuple[int, ...], way: Way, seed: int = 0) -> Any:
    """Return a list of random tensors of these shapes, without gradients."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(way.device, way.dtype) for shape in shapes]


def projection(
    rows: int, width: int, vocab: int, way: Way, seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and a table as leaves, and targets."""
    rng = torch.Generator().manual_seed(rows if seed is None else seed)
    hidden = torch.randn(rows, width, generator=rng).to(way.device, way.dtype)
    weight = (torch.randn(vocab, width, generator=rng) / width**0.5).to(way.device, way.dtype)
    target = torch.randint(0, vocab, (rows,), generator=rng).to(way.device)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def with_gradients(
    function: Callable[..., Tensor],
    operands: Mapping[str, Tensor],
    *args: Any,
    upstream: Tensor | None = None,
    zeros: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the result and the gradient of each operand, by name.

    Args:
        function: takes the operands, `args` and `options`.
        operands: in the order in which the function takes them.
        args: further arguments.
        upstream: the gradient of the result; random if None.
        zeros: gradients that do not exist are zeros; an error otherwise.
        options: further arguments.
    """
    leaves = [x.detach().requires_grad_() for x in operands.values()]
    out = function(*leaves, *args, **options)
    if upstream is None:
        upstream = random_upstream(out.shape, out)
    grads: Any = [torch.zeros_like(x) for x in leaves]
    if out.requires_grad or not zeros:
        grads = torch.autograd.grad(out, leaves, upstream.to(out), materialize_grads=zeros)
    return {"out": out.detach(), **dict(zip(operands, grads, strict=True))}


def random_upstream(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)


def assert_close_to_reference(
    got: dict[str, Tensor],
    op: ModuleType,
    operands: Mapping[str, Tensor],
    *args: Any,
    upstream: Tensor,
    **options: Any,
) -> None:
    """Apply the tolerance rule to a result and all gradients.

    Args:
        got: what `with_gradients` returned for the op.
        op: its `reference` module.
        operands: those of the call.
        args: other arguments of the call, on the CPU.
        upstream: the gradient of the result.
        options: of the call.
    """
    stored = {name: x.detach().cpu() for name, x in operands.items()}
    wide = {name: x.double() for name, x in stored.items()}
    upstream = upstream.cpu()
    exact = with_gradients(op.reference, wide, *args, upstream=upstream, zeros=True, **options)
    close = with_gradients(op.yardstick, stored, *args, upstream=upstream, zeros=True, **options)
    summed = op.terms({"out": upstream.double()}, *wide.values(), *args, **options)
    for name, x in got.items():
        assert_matches(x, exact[name], close[name], name=name, terms=summed.get(name))
