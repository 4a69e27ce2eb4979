"""The public patch_attention: contract, checks, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..._torch.attention_blocks import positive_scale
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def patch_attention(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, H_kv, K)
    v: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax attention of every byte to the bytes of its own patch.

    out[t, h] = sum over s of softmax_s(scale * q[t, h] . k[s, g]) v[s, g] with g = h // (H / H_kv)
    and s running over the patch of t; causal: over the bytes of the patch up to t.

    Args:
        q: (T, H, K) float32, bfloat16 or float16; float64 on the torch path.
        k: (T, H_kv, K) in q's dtype; H is a multiple of H_kv.
        v: (T, H_kv, K) in q's dtype.
        cu_patchlens: (P+1,) int32 patch boundaries in rows of q: from 0, non-decreasing, at most T.
            Any number of patches of any length. Rows from the last boundary on are never read;
            their outputs and gradients are zero.
        causal: whether a byte sees no later byte of its patch.
        scale: a finite number. None: K ** -0.5.
        impl: "auto", "triton" or "torch". The kernels take K from 16 to 128 in steps of 8.

    Returns: (T, H, K) in q's dtype, under autocast in the autocast dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for bad boundaries; NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> x, boundaries = torch.randn(7, 4, 16), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> patch_attention(x, x, x, boundaries).shape
    torch.Size([7, 4, 16])

    Numerics: docs/numerics.md. Source: MEGABYTE (arXiv 2305.07185) and Super Tiny Language Models
    (arXiv 2405.14159); tiles over the flat byte stream are this project's.
    """
    _checks.require_tensor("q", q, ("T", "H", "K"), _checks.FLOATS)
    (total, heads, width), dtypes = q.shape, runtime.activation_dtypes(q)
    _checks.require(heads >= 1 and width >= 1, "q", "H >= 1 and K >= 1", tuple(q.shape))
    _checks.require_tensor("k", k, (total, "H_kv", width), dtypes, q.device)
    divides = k.shape[1] >= 1 and heads % k.shape[1] == 0
    _checks.require(divides, "k", f"heads that divide the {heads} of q", k.shape[1])
    _checks.require_tensor("v", v, (total, k.shape[1], width), dtypes, q.device)
    _checks.require_offsets("cu_patchlens", cu_patchlens, q.device)
    _checks.require(isinstance(causal, bool), "causal", "a bool", repr(causal))
    _checks.require_scale(scale)
    if runtime.values_visible(cu_patchlens):
        _checks.check_offset_values("cu_patchlens", cu_patchlens, total)
    q, k, v = _library.distinct(q, k, v)
    out_dtype = runtime.compute_dtype(q)
    q, factor = positive_scale(q, scale)
    if use_triton(
        "patch_attention", impl, q.device, unsupported_reasons,
        q=q, k=k, v=v, cu_patchlens=cu_patchlens, causal=causal, scale=scale,
    ):  # fmt: skip
        return _PatchAttention.apply(q, k, v, cu_patchlens, causal, factor, out_dtype)[0]
    return torch_impl.patch_attention(q, k, v, cu_patchlens, causal, factor, out_dtype)


def _fwd_meta(q: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total, heads, _ = q.shape
    lse = q.new_empty((heads, total), dtype=torch.float32)
    return q.new_empty(q.shape, dtype=out_dtype), lse


def _products(count: int, q: Any, patches: int) -> int:
    """FLOPs of so many products, as of patches of equal length: shapes say no more."""
    return 2 * count * q[1] * q[2] * q[0] * q[0] // max(1, patches)


_FWD = _library.register(
    "patch_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_patchlens, bool causal, "
    "float scale, ScalarType out_dtype) -> (Tensor out, Tensor lse)",
    launcher="patch_attention:launch_fwd",
    meta=_fwd_meta,
    flops=lambda q, cu_patchlens: _products(2, q, cu_patchlens[0] - 1),
)
_BWD = _library.register(
    "patch_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_patchlens, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    launcher="patch_attention:launch_bwd",
    meta=lambda q, k, v: _library.empty_like(q, k, v),
    flops=lambda q, cu_patchlens: _products(5, q, cu_patchlens[0] - 1),
)
_PatchAttention = _library.differentiable(
    _FWD,
    of=("q", "k", "v"),
    keep=lambda q, k, v, out, lse, cu_patchlens, causal, scale: (
        (q, k, v, out, lse, cu_patchlens),
        (causal, scale),
    ),
    gradients=lambda needs, *given: _BWD(*given),
)
