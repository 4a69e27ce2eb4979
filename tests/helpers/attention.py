"""Shared by the tests of attention: operands, gradients by name, the tolerance rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers import tensors
from helpers.lanes import Way
from helpers.tensors import normal, random_upstream
from stlm_kernels import attention
from stlm_kernels.ops.attention import reference

NAMES = ("q", "k", "v")


def example(rows: tuple[int, ...], heads: int, kv_heads: int, width: int, way: Way) -> Any:
    """q, k, v without gradients."""
    return normal(*((*rows, n, width) for n in (heads, kv_heads, kv_heads)), way=way)


def with_gradients(
    operands: list[Tensor], way: Way, upstream: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The result and the gradients of q, k and v by name."""
    for name in ("cu_seqlens", "cu_seqlens_k"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].to(way.device)
    named = dict(zip(NAMES, operands, strict=True))
    return tensors.with_gradients(attention, named, upstream=upstream, impl=way.impl, **options)


def assert_close_to_reference(
    operands: list[Tensor], way: Way, **options: Any
) -> dict[str, Tensor]:
    """The tolerance rule, for the result and all gradients."""
    upstream = random_upstream(operands[0].shape, operands[0])
    got = with_gradients(operands, way, upstream, **options)
    named = dict(zip(NAMES, operands, strict=True))
    tensors.assert_close_to_reference(got, reference, named, upstream=upstream, **options)
    return got


def assert_close(got: Tensor, want: Tensor, way: Way, times: int = 16, message: str = "") -> None:
    bound = times * torch.finfo(way.dtype).eps
    torch.testing.assert_close(got, want, rtol=bound, atol=bound, msg=message or None)
