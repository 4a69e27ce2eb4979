"""Root-mean-square normalisation without a gain."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stlm_kernels import runtime

EPS = 1e-6
_WIDE = (torch.float32, torch.float64)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype; a GPU's autocast has fp32.

    There is no gain: where a linear map follows, it can learn one. A GPU runs F.rms_norm as one
    kernel. On a CPU its backward is a composition of many passes over x, as autograd's own is.
    """
    if runtime.on_gpu(x.device):
        return F.rms_norm(x, x.shape[-1:], eps=EPS)
    if x.dtype in _WIDE and not torch.is_grad_enabled():  # in few calls
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(x.new_full((), EPS), norm, norm, value=1 / x.shape[-1])
        return x * scale.rsqrt_()
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if needs_grad and not torch.compiler.is_compiling() and not runtime.needs_composition(x):
        normed: Tensor = _RMSNorm.apply(x)
        return normed
    return x * _inverse_rms(x)


def host_rms_norm(x: NDArray[Any], out: NDArray[Any]) -> None:
    """`rms_norm` of a row (D,) or rows (R, D) on the host, into out, in numpy's order of sums."""
    if x.size == x.shape[-1]:
        row = x.reshape(-1)
        np.multiply(x, 1 / sqrt(np.dot(row, row) / len(row) + EPS), out=out)
        return
    np.multiply(x, x, out=out)
    scales = np.add.reduce(out, 1, keepdims=True)
    scales *= 1 / x.shape[1]
    scales += EPS
    np.sqrt(scales, out=scales)
    np.divide(x, scales, out=out)


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., 1), in x's dtype."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class _RMSNorm(torch.autograd.Function):
    """The norm with its gradient in few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scales = _inverse_rms(x)
        ctx.save_for_backward(x, scales)
        return x * scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            scales = _inverse_rms(x)
        along = (grad * x).mean(-1, keepdim=True)
        # One after the other: the cube alone would overflow in 16 bits.
        return torch.addcmul(grad * scales, x, along * scales * scales * scales, value=-1)
