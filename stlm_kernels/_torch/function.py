"""Functions with gradients of our own: from a forward, what is kept of it, and the gradients."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import runtime

unwrap_if_dead = torch._C._functorch.unwrap_if_dead

Kept = tuple[Sequence[Tensor | None], Sequence[Any]]
"""Tensors and plain values that a backward takes beside the gradients."""


class Function(torch.autograd.Function):
    """An autograd.Function with `setup_context` and a quick `apply`.

    Torch binds the arguments of each call to the signature of `forward`, for defaults and keywords;
    that takes longer than all else in `apply`, and here there are neither.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the function; torch.compile looks at `forward` instead."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        if not torch.is_grad_enabled() and not runtime.forward_ad_runs():
            return cls.forward(*args)  # nothing is to be kept
        beneath = super(torch.autograd.Function, cls)
        # What a transform that has ended left in its wrapper; only tensors can be.
        given = [
            unwrap_if_dead(x) if type(x) not in runtime.VALUES and isinstance(x, Tensor) else x
            for x in args
        ]
        return beneath.apply(*given)  # type: ignore[attr-defined]


def differentiable(
    name: str,
    forward: Callable[..., Any],
    *,
    of: Sequence[str],
    keep: Callable[..., Kept],
    gradients: Callable[..., Tensor | Sequence[Tensor | None]],
    arguments: Sequence[str] = (),
    results: Sequence[str] = ("result",),
    derived: int = 1,
    fills: bool = True,
) -> type[Function]:
    """Make the Function of a forward and its gradients, to be called by `apply`.

    Args:
        name: of the class, which profilers show.
        forward: takes the arguments by position.
        of: the arguments that have gradients.
        keep: takes the arguments and results that its parameters name.
        gradients: (which of `of` need one, *gradients of the results, *tensors, *values) -> the
            gradient of each of `of`; of what needs none it may be anything.
        arguments, results: their names; those of the forward's parameters if none are given.
        derived: how many of the results have gradients, the first ones.
        fills: whether `gradients` gets zeros for a gradient that never came beside others, or None.
    """
    arguments = arguments or tuple(inspect.signature(forward).parameters)
    names = [*arguments, *results]
    kept = [names.index(parameter) for parameter in inspect.signature(keep).parameters]
    places = [arguments.index(argument) for argument in of]

    def run(*args: Any) -> Any:
        return forward(*args)

    run.__signature__ = signature(arguments)  # type: ignore[attr-defined]  # Dynamo counts them

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        values = (*inputs, *outputs)
        tensors, ctx.plain = keep(*[values[place] for place in kept])
        ctx.save_for_backward(*tensors)
        if not runtime.inside_torch_func():  # which hands over zeros of its own
            ctx.set_materialize_grads(False)
        ctx.shapes = [(x.shape, x.dtype) for x in outputs[:derived]] if derived > 1 else ()
        if len(outputs) > derived:
            ctx.mark_non_differentiable(*outputs[derived:])

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = _with_zeros(grads[:derived], ctx.shapes, fills)
        if given is None:
            return (None,) * len(arguments)
        needs = [ctx.needs_input_grad[place] for place in places]
        found = gradients(needs, *given, *ctx.saved_tensors, *ctx.plain)
        found = (found,) if isinstance(found, Tensor) else found
        every: list[Tensor | None] = [None] * len(arguments)
        for place, need, grad in zip(places, needs, found, strict=True):
            every[place] = grad if need else None
        return tuple(every)

    methods = {"forward": run, "setup_context": setup_context, "backward": backward}
    body: dict[str, Any] = {key: staticmethod(method) for key, method in methods.items()}
    body |= {"generate_vmap_rule": True}
    return types.new_class(name, (Function,), exec_body=lambda made: made.update(body))


def _with_zeros(
    grads: Sequence[Tensor | None], shapes: Sequence[tuple[torch.Size, torch.dtype]], fills: bool
) -> Sequence[Tensor | None] | None:
    """Gradients with zeros where autograd has none: one number, expanded. None: there are none."""
    some = [x for x in grads if x is not None]
    if not some or len(some) == len(grads) or not fills:
        return grads if some else None
    return [
        some[0].new_zeros((), dtype=dtype).expand(shape) if x is None else x
        for x, (shape, dtype) in zip(grads, shapes, strict=True)
    ]


def signature(names: Sequence[str]) -> inspect.Signature:
    """A signature of positional parameters, for a function that takes them starred."""
    kind = inspect.Parameter.POSITIONAL_ONLY
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])
