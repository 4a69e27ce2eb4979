"""The public qkv_rope: contract, checks, dispatch and the registered ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..qk_norm_rope.op import check_norms, check_tables, flat_positions
from . import torch_impl
from .config import declined_reasons, unsupported_reasons


@overload
def qkv_rope(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = ...,
    k_weight: Tensor | None = ...,
    positions: Tensor | None = ...,
    residual: Literal[False] = ...,
    eps: float = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def qkv_rope(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = ...,
    k_weight: Tensor | None = ...,
    positions: Tensor | None = ...,
    residual: Literal[True],
    eps: float = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@named_errors
def qkv_rope(
    x: Tensor,  # (B, T, D) or (T, D)
    norm_weight: Tensor | None,  # (D,)
    weight: Tensor,  # ((H + 2 H_kv) K, D)
    cos: Tensor,  # (n_positions, K/2)
    sin: Tensor,  # (n_positions, K/2)
    *,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,  # (K,)
    k_weight: Tensor | None = None,  # (K,)
    positions: Tensor | None = None,  # (B, T) or (T,)
    residual: bool = False,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Queries, keys and values of attention from its input: norm, product, norm and rotary.

    y = x / sqrt(mean(x^2) + eps) * norm_weight; y weight^T is cut into heads of q, k and v; q and k
    go through `qk_norm_rope`. Neither y nor the product is kept.

    Args:
        x: (B, T, D) or packed (T, D); float32, bfloat16 or float16; float64 on the torch path.
        norm_weight: (D,) in x's dtype, or float32 beside 16 bits (never cast). None: ones.
        weight: ((heads + 2 kv_heads) K, D), the rows of all heads of q, then of k, then of v; in
            x's dtype, or float32 beside 16 bits, which is cast.
        cos, sin: (n_positions, K/2), K even, in x's dtype or float32, never cast; without gradient.
        heads, kv_heads: H of q, H_kv of k and v.
        q_weight, k_weight: (K,) of norms of heads, dtypes as norm_weight. None: no norm of heads.
        positions: (T,) or, with dense x, (B, T) integers in [0, n_positions). None: 0 to T-1.
        residual: also return x, for the sum after attention: one pass forms its whole gradient.
        eps: a finite number >= 0, of all norms.
        impl: "auto", "triton" or "torch". The kernels take K up to 128 and D up to 1024; "auto"
            takes them where their bound is below that of the ops one by one (see `explain`).

    Returns: q (..., T, H, K), k and v (..., T, H_kv, K) as `attention` reads them, in x's dtype,
        under autocast in its dtype; where residual also a view of x.
    Raises: ValueError for a wrong type, dtype, shape, device or option, or too few positions;
        IndexError, on CPU in eager mode, for a position outside [0, n_positions);
        NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> x, weight, angles = torch.randn(9, 64), torch.randn(4 * 32, 64), torch.randn(9, 16)
    >>> qkv_rope(x, None, weight, angles.cos(), angles.sin(), heads=2, kv_heads=1)[0].shape
    torch.Size([9, 2, 32])

    Numerics: docs/numerics.md. Source: as of `qk_norm_rope`.
    """
    _checks.require(isinstance(residual, bool), "residual", "a bool", repr(residual))
    dense = isinstance(x, Tensor) and x.ndim == 3
    _checks.require_tensor("x", x, ("B", "T", "D") if dense else ("T", "D"), _checks.FLOATS)
    _checks.require(x.shape[-1] >= 1, "x", "D >= 1", tuple(x.shape))
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        _checks.require_int_at_least(name, count, 1)
    width = _width_of_heads(x, weight, heads + 2 * kv_heads)
    check_norms(x, {"norm_weight": norm_weight}, x.shape[-1], eps)
    check_tables(x, cos, sin, width // 2)
    check_norms(x, {"q_weight": q_weight, "k_weight": k_weight}, width, eps)
    lead = x.shape[:-1]
    positions, period = flat_positions(positions, lead, cos)
    arguments = (
        x.flatten(0, -2), norm_weight, weight, cos, sin, q_weight, k_weight, positions, period,
        heads, kv_heads, float(eps), runtime.compute_dtype(x),
    )  # fmt: skip
    if use_triton(
        "qkv_rope", impl, x.device, unsupported_reasons, declined_reasons,
        x=x, norm_weight=norm_weight, weight=weight, cos=cos, sin=sin, heads=heads,
        kv_heads=kv_heads, q_weight=q_weight, k_weight=k_weight, positions=positions,
        residual=residual, eps=eps,
    ):  # fmt: skip
        found = (_QKVRopeX if residual else _QKVRope).apply(*arguments)
    else:
        found = torch_impl.qkv_rope(*arguments)
        found = (*found, arguments[0].view_as(arguments[0])) if residual else found
    return tuple(y.view(*lead, *y.shape[1:]) for y in found)


def _width_of_heads(x: Tensor, weight: Tensor, heads: int) -> int:
    dtypes = _checks.weight_dtypes(x.dtype)
    _checks.require_tensor("weight", weight, ("(H + 2 H_kv) K", x.shape[-1]), dtypes, x.device)
    rows = weight.shape[0]
    ok = rows >= 2 * heads and rows % (2 * heads) == 0
    _checks.require(ok, "weight", f"rows of {heads} heads of an even K >= 2", tuple(weight.shape))
    return rows // heads


def _outputs(x: Tensor, weight: Tensor, heads: int, kv_heads: int, dtype: torch.dtype) -> Any:
    width = weight.shape[0] // (heads + 2 * kv_heads)
    return [x.new_empty((x.shape[0], n, width), dtype=dtype) for n in (heads, kv_heads, kv_heads)]


_FWD = _library.register(
    "qkv_rope_fwd(Tensor x, Tensor? norm_weight, Tensor weight, Tensor cos, Tensor sin, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? positions, SymInt period, SymInt heads, "
    "SymInt kv_heads, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    launcher="qkv_rope:launch_fwd",
    meta=lambda x, weight, heads, kv_heads, out_dtype: _outputs(
        x, weight, heads, kv_heads, out_dtype
    ),
    flops=lambda x, weight: 2 * x[0] * weight[0] * weight[1],
)
_BWD = _library.register(
    "qkv_rope_bwd(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? grad_x, Tensor x, "
    "Tensor? norm_weight, Tensor weight, Tensor cos, Tensor sin, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? positions, SymInt period, float eps, bool want_x, bool want_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher="qkv_rope:launch_bwd",
    meta=lambda x, norm_weight, weight, q_weight, k_weight, want_x, want_weight: (
        x.new_empty(x.shape if want_x else (0,)),
        *(
            x.new_empty((0,)) if w is None or not wanted else w.new_empty(w.shape)
            for w, wanted in (
                (norm_weight, want_x), (weight, want_weight), (q_weight, True), (k_weight, True)
            )
        ),
    ),
    flops=lambda x, weight, want_x, want_weight: (
        2 * x[0] * weight[0] * weight[1] * (1 + want_x + want_weight)
    ),
)  # fmt: skip
_LEAVES, _KEPT = (
    ("x", "norm_weight", "weight", "q_weight", "k_weight"),
    _library.names_of(_BWD)[4:-2],
)


def _gradients(needs: Sequence[bool], *given: Any) -> Any:
    return _BWD(*given, needs[0] or needs[1], needs[2])


_QKVRope = _library.differentiable(
    _FWD,
    of=_LEAVES,
    keep=_KEPT,
    gradients=lambda needs, q, k, v, *kept: _gradients(needs, q, k, v, None, *kept),
    derived=3,
)
_QKVRopeX = _library.differentiable(
    _FWD, of=_LEAVES, keep=_KEPT, gradients=_gradients, derived=4, returned="x"
)
