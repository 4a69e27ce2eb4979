"""The linear maps of a layer in as few products and casts as give the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stlm_kernels import runtime

Maps = Sequence[nn.Linear]
FEW_ROWS = 64
"""Up to here a CPU takes as long to copy weights side by side as to multiply by them."""


_kept: ContextVar[dict[Any, Tensor] | None] = ContextVar("kept_weights", default=None)


@contextmanager
def keeping(weights: dict[Any, Tensor]) -> Iterator[None]:
    """Keep in a dictionary the weights that lie side by side, for calls without gradients.

    Its owner empties it when a weight has changed.
    """
    token = _kept.set(weights)
    try:
        yield
    finally:
        _kept.reset(token)


class Products:
    """Products of a layer: each with the weights of one map, or of several that read the same.

    The maps keep weights of their own, which checkpoints, optimisers and whatever replaces single
    maps (quantisation, adapters) know by name. Where all are plain, weights that read the same lie
    side by side for one product; a GPU's autocast casts all of them in one launch, and their
    gradients in another. A map that is no plain `nn.Linear`, or that others watch, is called.

    Args:
        x: what the first product reads, (..., D).
        products: the maps of each.
    """

    def __init__(self, x: Tensor, *products: Maps) -> None:
        self.products = products
        self._cast: Sequence[Tensor] | None = None
        gpu, kept = runtime.on_gpu(x.device), _kept_weights() is not None
        self._plain = all(map(is_plain, _flat(products)))
        self._side_by_side = self._plain and (gpu or kept or x.numel() > FEW_ROWS * x.shape[-1])
        dtype = runtime.compute_dtype(x)
        if gpu and self._plain and not kept and not torch.compiler.is_compiling():
            weights = [each.weight for each in _flat(products)]
            if dtype.itemsize < 4 and all(weight.dtype == torch.float32 for weight in weights):
                heights = tuple(tuple(each.weight.shape[0] for each in maps) for maps in products)
                self._cast = _CastTogether.apply(dtype, heights, *weights)

    def __call__(self, index: int, x: Tensor) -> Sequence[Tensor]:
        """Return what each map of a product makes of x (..., D)."""
        maps = self.products[index]
        if self._cast is not None:
            out = F.linear(x, self._cast[index])
        elif self._side_by_side and len(maps) > 1:
            out = F.linear(x, _side_by_side(maps, runtime.compute_dtype(x)))
        else:
            return [cast(Tensor, each(x)) for each in maps]
        return out.split([each.weight.shape[0] for each in maps], -1) if len(maps) > 1 else [out]


def _kept_weights() -> dict[Any, Tensor] | None:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _kept.get()


def operands(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, list[Tensor]]:
    """Return what an op reads, and the weights of its maps.

    Within `keeping` weights are cast once for all calls, and x as they are, for an op would.
    """
    kept, dtype = _kept_weights(), runtime.compute_dtype(x)
    if kept is None:
        return x, [each.weight for each in maps]
    found = []
    for each in maps:
        if each.weight.dtype != dtype and (id(each), dtype) not in kept:
            kept[id(each), dtype] = each.weight.to(dtype)
        found.append(kept.get((id(each), dtype), each.weight))
    return x.to(dtype), found


def _side_by_side(maps: Maps, dtype: torch.dtype) -> Tensor:
    kept = _kept_weights()
    if kept is None:
        return torch.cat([each.weight for each in maps])
    key = id(maps[0]), dtype
    if key not in kept:
        kept[key] = torch.cat([each.weight for each in maps]).to(dtype)
    return kept[key]


def _flat(products: Sequence[Maps]) -> list[nn.Linear]:
    return [each for maps in products for each in maps]


def is_plain(each: nn.Module) -> bool:
    """Return whether a map is its product alone: no class of its own, no bias, watched by none."""
    if type(each) is not nn.Linear or each.bias is not None or "forward" in vars(each):
        return False
    if is_traceable_wrapper_subclass(each.weight):  # quantised, or divided among processes
        return False
    watched = each._forward_hooks or each._forward_pre_hooks
    return not (watched or each._backward_hooks or each._backward_pre_hooks)


class _CastTogether(torch.autograd.Function):
    """Cast weights, those of one product side by side, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, heights: Sequence[Sequence[int]], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.heights, ctx.dtypes = heights, [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        widths = [weights[i].shape[1] for i in _firsts(heights)]
        whole = [
            weights[0].new_empty((sum(rows), width), dtype=dtype)
            for rows, width in zip(heights, widths, strict=True)
        ]
        parts = [
            part for x, rows in zip(whole, heights, strict=True) for part in x.split(list(rows))
        ]
        torch._foreach_copy_(parts, list(weights))
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        parts: list[Tensor | None] = []
        for grad, rows in zip(grads, ctx.heights, strict=True):
            parts += [None] * len(rows) if grad is None else grad.split(list(rows))
        wanted = [i for i, x in enumerate(parts) if x is not None and ctx.needs_input_grad[2 + i]]
        found: list[Tensor | None] = [None] * len(parts)
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            for i in wanted:
                found[i] = cast(Tensor, parts[i]).to(ctx.dtypes[i])
        elif wanted:
            given = [cast(Tensor, parts[i]) for i in wanted]
            made = [x.new_empty(x.shape, dtype=torch.float32) for x in given]
            torch._foreach_copy_(made, given)
            for i, x in zip(wanted, made, strict=True):
                found[i] = x
        return None, None, *found


def _firsts(heights: Sequence[Sequence[int]]) -> list[int]:
    """Place of the first weight of each product."""
    return [sum(map(len, heights[:i])) for i in range(len(heights))]
