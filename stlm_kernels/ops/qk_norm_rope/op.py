"""The public qk_norm_rope: contract, checks, dispatch and the registered ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def qk_norm_rope(
    q: Tensor,  # (B, T, H, K) or (T, H, K)
    k: Tensor,  # (B, T, H_kv, K) or (T, H_kv, K)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    *,
    q_weight: Tensor | None = None,  # (K,)
    k_weight: Tensor | None = None,  # (K,)
    eps: float = 1e-6,
    positions: Tensor | None = None,  # (B, T) or (T,)
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """RMS norm of each head of q and k, then rotary positions, both in one pass over memory.

    y = x / sqrt(mean(x^2) + eps) * weight where a weight is given, else x; then each pair (a, b) of
    y becomes (a cos - b sin, a sin + b cos) with cos and sin of the row's position.

    Args:
        q: (B, T, H, K) or packed (T, H, K), K even; float32, bfloat16 or float16; float64 on the
            torch path. A slice of a packed projection is not copied.
        k: (B, T, H_kv, K) or (T, H_kv, K) in q's dtype.
        cos, sin: (n_positions, K/2) in q's dtype or float32, never cast; column i belongs to
            pair i. No gradient: tables that require one are refused in grad mode.
        q_weight, k_weight: (K,) of the norms, in q's dtype, or float32 beside 16 bits (never cast).
            None: no norm.
        eps: a finite number >= 0.
        positions: (T,) or, with dense q, (B, T) uint8, int16, int32 or int64 in [0, n_positions).
            None: 0 to T-1.
        interleaved: whether pairs are (2i, 2i + 1) instead of (i, i + K/2).
        impl: "auto", "triton" or "torch". The kernels take K up to 256.

    Returns: (q, k) in their shapes, new and contiguous, in q's dtype, under autocast in its dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, or fewer positions than
        rows; IndexError, on CPU in eager mode, for a position outside [0, n_positions);
        NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> q, k, angles = torch.randn(9, 8, 32), torch.randn(9, 2, 32), torch.randn(9, 16)
    >>> [x.shape for x in qk_norm_rope(q, k, angles.cos(), angles.sin())]
    [torch.Size([9, 8, 32]), torch.Size([9, 2, 32])]

    Numerics: docs/numerics.md. Source: arXiv 2104.09864 (rotary), 2010.04245 (norm).
    """
    _check_heads(q, k)
    check_tables(q, cos, sin, q.shape[-1] // 2)
    check_norms(q, {"q_weight": q_weight, "k_weight": k_weight}, q.shape[-1], eps)
    _checks.require(isinstance(interleaved, bool), "interleaved", "a bool", repr(interleaved))
    positions, length = flat_positions(positions, q.shape[:-2], cos)
    out_dtype = runtime.compute_dtype(q)
    q, k = _library.distinct(q, k)
    arguments = (
        q.flatten(0, -3), k.flatten(0, -3), cos, sin, q_weight, k_weight, positions, length,
        float(eps), interleaved, out_dtype,
    )  # fmt: skip
    if use_triton(
        "qk_norm_rope", impl, q.device, unsupported_reasons,
        q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, eps=eps,
        positions=positions, interleaved=interleaved,
    ):  # fmt: skip
        turned = _QKNormRope.apply(*arguments)
    else:
        turned = torch_impl.qk_norm_rope(*arguments)
    return turned[0].view(q.shape), turned[1].view(k.shape)


def _check_heads(q: Tensor, k: Tensor) -> None:
    dense = isinstance(q, Tensor) and q.ndim == 4
    shape = ("B", "T", "H", "K") if dense else ("T", "H", "K")
    _checks.require_tensor("q", q, shape, _checks.FLOATS)
    heads, width = q.shape[-2:]
    ok = heads >= 1 and width >= 2 and width % 2 == 0
    _checks.require(ok, "q", "H >= 1 and an even K >= 2", tuple(q.shape))
    dtypes = runtime.activation_dtypes(q)
    _checks.require_tensor("k", k, (*q.shape[:-2], "H_kv", width), dtypes, q.device)
    _checks.require(k.shape[-2] >= 1, "k", "H_kv >= 1", tuple(k.shape))


def check_tables(x: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> None:
    """Refuse tables that do not fit the pairs of a head."""
    dtypes = tuple(dict.fromkeys((x.dtype, torch.float32)))
    _checks.require_tensor("cos", cos, ("n_positions", pairs), dtypes, x.device)
    _checks.require_tensor("sin", sin, tuple(cos.shape), dtypes, x.device)
    for name, table in (("cos", cos), ("sin", sin)):
        fixed = not (table.requires_grad and torch.is_grad_enabled())
        _checks.require(fixed, name, "a table without gradient", "one that requires it")


def check_norms(x: Tensor, weights: Mapping[str, Tensor | None], width: int, eps: float) -> None:
    """Refuse weights, by name, and the eps that do not fit norms over `width`."""
    for name, weight in weights.items():
        if weight is not None:
            dtypes = _checks.weight_dtypes(x.dtype)
            _checks.require_tensor(name, weight, (width,), dtypes, x.device)
    number = _checks.is_finite(eps) and eps >= 0
    _checks.require_number(number, "eps", "a finite number >= 0", eps)


def flat_positions(
    positions: Tensor | None, lead: torch.Size, cos: Tensor
) -> tuple[Tensor | None, int]:
    """Checked positions of rows (..., T) as one line, and after how many rows they begin anew."""
    length, n_positions = lead[-1], cos.shape[0]
    if positions is None:
        if n_positions < length:  # the message made only then: it would fix a traced size
            _checks.require(False, "cos", f"at least T = {length} positions", n_positions)
        return None, length
    by_row = len(lead) == 2 and isinstance(positions, Tensor) and positions.ndim == 2
    shape = tuple(lead) if by_row else (length,)
    _checks.require_tensor("positions", positions, shape, _checks.ID_DTYPES, cos.device)
    if runtime.values_visible(positions):
        _checks.check_id_values("positions", positions, 0, n_positions)
    positions = positions.flatten()
    return positions, positions.shape[0]


def _elements(q: Any, k: Any) -> int:
    return q[0] * q[2] * (q[1] + k[1])


_FWD = _library.register(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? positions, SymInt period, float eps, bool interleaved, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    launcher="qk_norm_rope:launch_fwd",
    meta=lambda q, k, out_dtype: [x.new_empty(x.shape, dtype=out_dtype) for x in (q, k)],
    flops=lambda q, k: 7 * _elements(q, k),
)
_BWD = _library.register(
    "qk_norm_rope_bwd(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor cos, Tensor sin, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? positions, SymInt period, float eps, "
    "bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher="qk_norm_rope:launch_bwd",
    meta=lambda q, k, q_weight, k_weight: _library.empty_like(
        q, k, *(q.new_empty(0) if weight is None else weight for weight in (q_weight, k_weight))
    ),
    flops=lambda q, k: 14 * _elements(q, k),
)
_QKNormRope = _library.differentiable(
    _FWD,
    of=("q", "k", "q_weight", "k_weight"),
    keep=_library.names_of(_BWD)[2:],
    gradients=lambda needs, *given: _BWD(*given),
    derived=2,
)
