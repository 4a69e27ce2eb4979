"""The public swiglu: contract, checks, dispatch and the registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, _sharding, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._torch.casting import cast
from . import torch_impl
from .config import declined_reasons, packed_shape, unsupported_reasons


@named_errors
def swiglu(
    x: Tensor,  # (T, D)
    norm_weight: Tensor | None,  # (D,)
    gate_up: Tensor,  # (2F, D)
    down: Tensor,  # (D, F)
    *,
    residual: bool = True,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> Tensor:
    """RMS norm, gated feed-forward and residual: what is F wide never exists in device memory.

    n = x / sqrt(mean(x^2) + eps) * norm_weight; gate, up = n @ gate_up.T;
    result = (silu(gate) * up) @ down.T, plus x where residual.

    Args:
        x: (T, D) float32, bfloat16 or float16; float64 on the torch path.
        norm_weight: (D,) in x's dtype, or float32 beside 16 bits (never cast). None: ones.
        gate_up: (2F, D), rows 0 to F-1 of the gate, rows F to 2F-1 of up; in x's dtype, or float32
            beside 16 bits, cast when loaded.
        down: (D, F), likewise.
        residual: whether x is added.
        eps: a finite number >= 0.
        impl: "auto", "triton" or "torch". The kernels take D up to 256. "auto" leaves wider rows
            and float32 to the composition, which costs less there; see `explain`.

    Returns: (T, D) in x's dtype, under autocast in its dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option; NotImplementedError where
        impl="triton" cannot run, with all reasons.

    >>> x, gate_up, down = torch.randn(9, 64), torch.randn(320, 64), torch.randn(64, 160)
    >>> swiglu(x, torch.ones(64), gate_up, down).shape
    torch.Size([9, 64])

    Numerics: docs/numerics.md. Source: arXiv 2002.05202.
    """
    _sharding.require_plain(x=x, norm_weight=norm_weight, gate_up=gate_up, down=down)
    _check_tensors(x, norm_weight, gate_up, down)
    number = _checks.is_finite(eps) and eps >= 0
    _checks.require_number(number, "eps", "a finite number >= 0", eps)
    _checks.require(isinstance(residual, bool), "residual", "a bool", repr(residual))
    out_dtype = runtime.compute_dtype(x)
    if use_triton(
        "swiglu", impl, x.device, unsupported_reasons, declined_reasons,
        x=x, norm_weight=norm_weight, gate_up=gate_up, down=down, residual=residual, eps=eps,
    ):  # fmt: skip
        if norm_weight is not None:
            wide = torch.promote_types(out_dtype, torch.float32)
            with runtime.without_autocast(x):
                gate_up = cast(gate_up, out_dtype, wide) * norm_weight.to(wide)
        found: Tensor = _SwiGLU.apply(x, gate_up, down, residual, float(eps), out_dtype)[0]
        return found
    return torch_impl.swiglu(x, norm_weight, gate_up, down, residual, float(eps), out_dtype)


def _check_tensors(x: Any, norm_weight: Any, gate_up: Any, down: Any) -> None:
    _checks.require_tensor("x", x, ("T", "D"), _checks.FLOATS)
    width = x.shape[1]
    _checks.require(width >= 1, "x", "D >= 1", tuple(x.shape))
    dtypes = _checks.weight_dtypes(x.dtype)
    if norm_weight is not None:
        _checks.require_tensor("norm_weight", norm_weight, (width,), dtypes, x.device)
    _checks.require_tensor("gate_up", gate_up, ("2F", width), dtypes, x.device)
    rows = gate_up.shape[0]
    _checks.require(rows >= 2 and rows % 2 == 0, "gate_up", "2F rows, F >= 1", tuple(gate_up.shape))
    _checks.require_tensor("down", down, (width, rows // 2), dtypes, x.device)


def _products(x: Any, down: Any, count: int) -> int:
    """FLOPs of so many products of x and a (D, F) weight."""
    return 2 * count * x[0] * down[0] * down[1]


_FWD = _library.register(
    "swiglu_fwd(Tensor x, Tensor gate_up, Tensor down, bool residual, float eps, "
    "ScalarType out_dtype) -> (Tensor out, Tensor scale, Tensor packed)",
    launcher="swiglu:launch_fwd",
    meta=lambda x, down, out_dtype: (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape[:1], dtype=torch.float32),
        x.new_empty(packed_shape(*down.shape), dtype=out_dtype),
    ),
    flops=lambda x, down: _products(x, down, 3),
)
_BWD = _library.register(
    "swiglu_bwd(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor scale, Tensor packed, "
    "bool residual, bool[] wants) -> (Tensor, Tensor, Tensor)",
    launcher="swiglu:launch_bwd",
    meta=lambda x, gate_up, down, wants: _library.empty_like(
        *(
            each if wanted else each.new_empty(0)
            for each, wanted in zip((x, gate_up, down), wants, strict=True)
        )
    ),
    flops=lambda x, down, wants: _products(x, down, 3 * wants[0] + 2 * wants[1] + wants[2]),
)
_SwiGLU = _library.differentiable(
    _FWD,
    of=("x", "gate_up", "down"),
    keep=("x", "gate_up", "down", "scale", "packed", "residual"),
    gradients=lambda needs, grad, *kept: _BWD(grad, *kept, list(needs)),
)
