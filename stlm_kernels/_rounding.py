"""Rounding of operands to the compute dtype, for the torch paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Rounded(torch.autograd.Function):
    """What another dtype holds of x, widened. The gradient passes without being rounded twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        return x.to(dtype).to(wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None, None


def rounded(x: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """x as `dtype` holds it, in `wide`; its gradient is rounded once, to x's own dtype."""
    if x.dtype == dtype:
        return x if dtype == wide else x.to(wide)
    return _Rounded.apply(x, dtype, wide)
