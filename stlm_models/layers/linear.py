"""The weights of linear maps, as ops read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stlm_kernels import runtime

_kept: ContextVar[dict[Any, Tensor] | None] = ContextVar("kept_weights", default=None)


@contextmanager
def keeping(weights: dict[Any, Tensor]) -> Iterator[None]:
    """Keep in a dictionary the weights that are cast, for calls without gradients.

    Its owner empties it when a weight has changed.
    """
    token = _kept.set(weights)
    try:
        yield
    finally:
        _kept.reset(token)


def operands(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, list[Tensor]]:
    """Return what an op reads, and the weights of its maps.

    Within `keeping` weights are cast once for all calls, and x as they are, for an op would.
    """
    kept = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else _kept.get()
    if kept is None:
        return x, [each.weight for each in maps]
    found, dtype = [], runtime.compute_dtype(x)
    for each in maps:
        if each.weight.dtype != dtype and (id(each), dtype) not in kept:
            kept[id(each), dtype] = each.weight.to(dtype)
        found.append(kept.get((id(each), dtype), each.weight))
    return x.to(dtype), found


def is_plain(each: nn.Module) -> bool:
    """Return whether a map is its product alone: no class of its own, no bias, watched by none."""
    if type(each) is not nn.Linear or each.bias is not None or "forward" in vars(each):
        return False
    if is_traceable_wrapper_subclass(each.weight):  # quantised, or divided among processes
        return False
    watched = each._forward_hooks or each._forward_pre_hooks
    return not (watched or each._backward_hooks or each._backward_pre_hooks)
