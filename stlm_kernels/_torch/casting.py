"""Casts of operands to the compute dtype, for the torch paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from .function import Function


class _Cast(Function):
    """Cast x to another dtype and back; gradients and tangents are not cast twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        return x.to(dtype).to(wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.wide = inputs[0].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].to(ctx.dtype), None, None


class _CastForward(_Cast):
    """Cast with a tangent, of which Dynamo would trace neither."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return dx.to(ctx.wide)


def cast(x: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """x as `dtype` holds it, in `wide`; its gradient is cast once, to x's own dtype."""
    if x.dtype == dtype:
        return x if dtype == wide else x.to(wide)
    function = _CastForward if runtime.carries_tangents(x) else _Cast
    return function.apply(x, dtype, wide)
