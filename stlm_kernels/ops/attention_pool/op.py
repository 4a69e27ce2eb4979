"""The public attention_pool: contract, checks, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def attention_pool(
    query: Tensor,  # (H, K) or (P, H, K)
    key: Tensor,  # (T, H_kv, K)
    value: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    *,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Pool the bytes of each patch by attention: one query per patch and head.

    out[p, h] = sum over t of softmax_t(scale * query[p, h] . key[t, g]) value[t, g] with g = h //
    (H / H_kv) and t running over the bytes of patch p.

    Args:
        query: (H, K), the same for every patch, or (P, H, K). In key's dtype; the shared one may
            also be float32 beside a 16-bit key and is then cast when loaded.
        key: (T, H_kv, K) float32, bfloat16 or float16; float64 on the torch path. H is a multiple
            of H_kv.
        value: (T, H_kv, K) in key's dtype.
        cu_patchlens: (P+1,) int32 patch boundaries in rows of key: from 0, non-decreasing, at most
            T. Rows from the last boundary on are never read, and their gradients are zero.
        scale: a finite number. None: K ** -0.5.
        impl: "auto", "triton" or "torch". The kernels take K from 8 to 128 in steps of 8.

    Returns: (P, H, K) in key's dtype, under autocast in the autocast dtype. Empty patches give
        zeros and take no gradient.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for bad boundaries; NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> key, boundaries = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    >>> attention_pool(torch.randn(4, 8), key, key, boundaries).shape
    torch.Size([2, 4, 8])

    Numerics: docs/numerics.md. Source: BLT's encoder (arXiv 2412.09871) and HAT (arXiv 2501.10322).
    """
    _checks.require_tensor("key", key, ("T", "H_kv", "K"), _checks.FLOATS)
    total, kv_heads, width = key.shape
    _checks.require(kv_heads >= 1 and width >= 1, "key", "H_kv >= 1 and K >= 1", tuple(key.shape))
    dtypes = runtime.activation_dtypes(key)
    _checks.require_tensor("value", value, (total, kv_heads, width), dtypes, key.device)
    _checks.require_offsets("cu_patchlens", cu_patchlens, key.device)
    _check_query(query, key, cu_patchlens.shape[0] - 1)
    _checks.require_scale(scale)
    if runtime.values_visible(cu_patchlens):
        _checks.check_offset_values("cu_patchlens", cu_patchlens, total)
    factor, out_dtype = width**-0.5 if scale is None else float(scale), runtime.compute_dtype(key)
    if use_triton(
        "attention_pool", impl, key.device, unsupported_reasons,
        query=query, key=key, value=value, cu_patchlens=cu_patchlens, scale=scale,
    ):  # fmt: skip
        query, key, value = _library.distinct(query, key, value)
        return _AttentionPool.apply(query, key, value, cu_patchlens, factor, out_dtype)[0]
    return torch_impl.attention_pool(query, key, value, cu_patchlens, factor, out_dtype)


def _check_query(query: Tensor, key: Tensor, patches: int) -> None:
    """A query shared by all patches is a weight, one of each patch an activation."""
    _checks.require(isinstance(query, Tensor), "query", "a Tensor", type(query).__name__)
    width = key.shape[2]
    if query.ndim not in (2, 3):
        shapes = f"(H, {width}) or ({patches}, H, {width})"
        raise ValueError(f"query: expected shape {shapes}, got {tuple(query.shape)}")
    dtypes = runtime.activation_dtypes(key)
    if query.ndim == 2:
        dtypes = (*dtypes, *_checks.weight_dtypes(key.dtype)[1:])
    shape = ("H", width) if query.ndim == 2 else (patches, "H", width)
    _checks.require_tensor("query", query, shape, dtypes, key.device)
    heads, kv_heads = query.shape[-2], key.shape[1]
    divides = heads >= 1 and heads % kv_heads == 0
    _checks.require(divides, "query", f"a multiple of key's {kv_heads} heads", heads)


def _fwd_meta(
    query: Tensor, key: Tensor, cu_patchlens: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    patches, (heads, width) = cu_patchlens.shape[0] - 1, query.shape[-2:]
    lse = key.new_empty((patches, heads), dtype=torch.float32)
    return key.new_empty((patches, heads, width), dtype=out_dtype), lse


def _products(query: Any, key: Any) -> int:
    """FLOPs of one product of every byte with a query, or of its weight with a value."""
    return 2 * key[0] * query[-2] * query[-1]


_FWD = _library.register(
    "attention_pool_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_patchlens, float scale, "
    "ScalarType out_dtype) -> (Tensor out, Tensor lse)",
    launcher="attention_pool:launch_fwd",
    meta=_fwd_meta,
    flops=lambda query, key: 2 * _products(query, key),
)
_BWD = _library.register(
    "attention_pool_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor cu_patchlens, "
    "Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    launcher="attention_pool:launch_bwd",
    meta=lambda query, key, value: _library.empty_like(query, key, value),
    flops=lambda query, key: 5 * _products(query, key),
)
_AttentionPool = _library.differentiable(
    _FWD,
    of=("query", "key", "value"),
    keep=_library.names_of(_BWD)[1:],
    gradients=lambda needs, *given: _BWD(*given),
)
