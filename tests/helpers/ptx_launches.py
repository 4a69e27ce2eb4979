"""Launches of small kernels, and the same launches with a fault planted in their PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stlm_kernels import ptx
from stlm_kernels.ptx import Execution


def rows(kernels: Any, n: int = 1000) -> tuple[Execution, Tensor, Tensor]:
    x, y = torch.randn(n), torch.randn(n)
    out = torch.full((n,), float("nan"))
    done = ptx.run(kernels.add_rows, (8,), x, y, out, n, BLOCK=128, num_warps=2)
    return done, out, x + y


def sums(kernels: Any) -> tuple[Execution, Tensor, Tensor]:
    x, out = torch.randn(5, 200), torch.full((5,), float("nan"))
    done = ptx.run(kernels.row_sums, (5,), x, out, 200, BLOCK=256, num_warps=4)
    return done, out, x.sum(1)


def products(
    kernels: Any, arch: int, dtype: torch.dtype = torch.bfloat16, **options: int
) -> tuple[Execution, Tensor, Tensor]:
    a, b = torch.randn(64, 128, dtype=dtype), torch.randn(128, 64, dtype=dtype)
    out = torch.full((64, 64), float("nan"))
    options = {"num_warps": 4, "num_stages": 3, **options}
    done = ptx.run(  # triton 3.6 leaves fences out
        kernels.multiply, (1,), a, b, out, 128, arch=arch, collect=("proxy",), M=64, N=64, K=32,
        **options,
    )  # fmt: skip
    return done, out, (a.double() @ b.double()).float()


def again(done: Execution, change: Callable[[str], str], **options: Any) -> Execution:
    """Repeat a launch with changed PTX."""
    text = change(done.ptx)
    assert text != done.ptx, "the fault was not planted"
    return ptx.execute(text, done.grid, done.arguments, shared_bytes=done.shared_bytes, **options)


def without(pattern: str, count: int = 0) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, "", text, count=count)


def replaced(pattern: str, new: str, count: int = 1) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, new, text, count=count)
