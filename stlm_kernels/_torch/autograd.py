"""Gradients through autograd of a plain composition, for the backwards of the torch paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import runtime


def is_needed(*grads: Tensor) -> bool:
    """Return whether a backward is itself differentiated, or is given gradients many at a time or
    with tangents.

    What a fast backward allocates could not be written with the latter two.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or runtime.many_at_once(*grads):
        return True
    return runtime.carries_tangents(*grads)


def gradients(
    compose: Callable[..., Tensor | Sequence[Tensor]],
    operands: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of `compose` for its operands, None where not required; `grads` of its results."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a tensor given for two operands has a gradient for each.
        views = [None if x is None else x.view_as(x) for x in operands]
        results = compose(*views)
    results = (results,) if isinstance(results, Tensor) else results
    # A result may depend on nothing, such as the attention of no document.
    roots = [(x, grad) for x, grad in zip(results, grads, strict=False) if x.requires_grad]
    leaves = [x for x in views if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in roots],
            leaves,
            [grad for _, grad in roots],
            create_graph=create_graph,
            materialize_grads=True,
        )
        if roots
        else map(torch.zeros_like, leaves)
    )
    return [next(found) if x is not None and x.requires_grad else None for x in views]


def as_output(x: Tensor) -> Tensor:
    """Prepare a result that may have been written in place for return from a Function's forward.

    Compiled by torch 2.11, such a tensor itself has gradients of zero; a view of it has them right.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x
