"""What the tests of attention share: operands, gradients by name, the tolerance rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.lanes import Way
from stlm_kernels import attention
from stlm_kernels.ops.attention.reference import reference, terms, yardstick
from stlm_kernels.testing import assert_matches

NAMES = ("q", "k", "v")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def example(rows: tuple[int, ...], heads: int, kv_heads: int, width: int, way: Way) -> Any:
    """q, k, v without gradients."""
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(*rows, n, width, generator=rng).to(way.device, way.dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def with_gradients(
    operands: list[Tensor], way: Way, upstream: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The result and the gradients of q, k and v by name."""
    operands = [x.detach().requires_grad_() for x in operands]
    for name in ("cu_seqlens", "cu_seqlens_k"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].to(way.device)
    out = attention(*operands, impl=way.impl, **options)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, operands, upstream)
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def assert_close_to_oracle(operands: list[Tensor], way: Way, **options: Any) -> dict[str, Tensor]:
    """The tolerance rule, for the result and all gradients."""
    upstream = torch.randn(operands[0].shape, generator=torch.Generator().manual_seed(1))
    got = with_gradients(operands, way, upstream.to(operands[0]), **options)
    judged: list[dict[str, Tensor]] = []
    for function, convert in ((reference, torch.Tensor.double), (yardstick, torch.Tensor.clone)):
        leaves = [convert(x.detach().cpu()).requires_grad_() for x in operands]
        out = function(*leaves, **options)
        up = upstream.to(operands[0].dtype).to(out)
        grads: Any = [torch.zeros_like(x) for x in leaves]
        if out.requires_grad:
            grads = torch.autograd.grad(out, leaves, up, materialize_grads=True)
        judged.append({"out": out, **dict(zip(NAMES, grads, strict=True))})
    wide = [x.detach().cpu().double() for x in operands]
    summed = terms({"out": upstream.to(operands[0].dtype).cpu().double()}, *wide, **options)
    for name, x in got.items():
        judges = (judged[0][name], judged[1][name])
        assert_matches(x, *judges, name=name, terms=summed.get(name))
    return got


def assert_close(got: Tensor, want: Tensor, way: Way, times: int = 16, message: str = "") -> None:
    bound = times * torch.finfo(way.dtype).eps
    torch.testing.assert_close(got, want, rtol=bound, atol=bound, msg=message or None)
