"""The public byte_pool: contract, checks, dispatch, and the registered op beneath it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons

MODES = ("mean", "sum")
OF_STATES = ("max", "min", "first", "last")
"""Modes that `segment_pool` alone has."""


@named_errors
def byte_pool(
    byte_ids: Tensor,  # (T,) uint8|int16|int32|int64
    weight: Tensor,  # (V, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    *,
    mode: str = "mean",
    position_weight: Tensor | None = None,  # (L, D)
    impl: Impl = "auto",
) -> Tensor:
    """Look bytes up in an embedding table and pool them into patches; (T, D) never exists.

    out[p] = scale_p * sum over k < n_p of gain_k * weight[byte_ids[cu_patchlens[p] + k]], with n_p
    the length of patch p, scale_p = 1 ("sum") or 1 / n_p ("mean"), and gain_k = 1 or row
    min(k, L-1) of `position_weight`, which makes the pool depend on the order of the bytes.

    Args:
        byte_ids: (T,) uint8, int16, int32 or int64, in [0, V) before the last boundary.
        weight: (V, D) float32, bfloat16 or float16; float64 on the torch path.
        cu_patchlens: (P+1,) int32 patch boundaries in bytes: from 0, non-decreasing, at most T.
            Bytes from the last boundary on belong to no patch.
        mode: "mean" or "sum"; for others see `segment_pool(F.embedding(ids, weight), ...)`.
        position_weight: (L, D) with L >= 1, in the table's dtype, or float32 beside a 16-bit table
            (cast to its dtype when loaded). None: every byte counts alike.
        impl: "auto", "triton" or "torch".

    Returns: (P, D) in the table's dtype, under autocast in the autocast dtype. Empty patches give
        zeros and take no gradient.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for bad boundaries; IndexError there for an id of a patch outside [0, V);
        NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> ids, boundaries = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3, 4], dtype=torch.int32)
    >>> byte_pool(ids, torch.ones(256, 2), boundaries, mode="sum").tolist()
    [[3.0, 3.0], [1.0, 1.0]]

    Numerics: docs/numerics.md. Source: the pooled byte patches of Super Tiny Language Models
    (arXiv 2405.14159); the gradient by a patch x byte count matrix is this project's.
    """
    _check(byte_ids, weight, cu_patchlens, mode, position_weight)
    if runtime.values_visible(byte_ids, cu_patchlens):
        last = _checks.check_offset_values("cu_patchlens", cu_patchlens, byte_ids.shape[0])
        # Bytes beyond the last boundary belong to no patch, so they may hold anything.
        _checks.check_id_values("byte_ids", byte_ids[:last], 0, weight.shape[0])
    out_dtype = runtime.compute_dtype(weight)
    mean = mode == "mean"
    if use_triton(
        "byte_pool",
        impl,
        weight.device,
        unsupported_reasons,
        byte_ids=byte_ids,
        weight=weight,
        cu_patchlens=cu_patchlens,
        mode=mode,
        position_weight=position_weight,
    ):
        return _BytePool.apply(byte_ids, weight, cu_patchlens, position_weight, mean, out_dtype)
    return torch_impl.byte_pool(byte_ids, weight, cu_patchlens, position_weight, mean, out_dtype)


@_checks.once_per_signature
def _check(
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    mode: str,
    position_weight: Tensor | None,
) -> None:
    _checks.require_tensor("weight", weight, ("V", "D"), _checks.FLOATS)
    vocab, width = weight.shape
    _checks.require(vocab >= 1 and width >= 1, "weight", "V >= 1 and D >= 1", (vocab, width))
    _checks.require_ids("byte_ids", byte_ids, weight.device)
    _checks.require_offsets("cu_patchlens", cu_patchlens, weight.device)
    if mode in OF_STATES:
        expected = "'mean' or 'sum', or segment_pool of the embeddings"
        raise ValueError(f"mode: expected {expected}, got {mode!r}")
    _checks.require_choice("mode", mode, MODES)
    if position_weight is not None:
        dtypes = _checks.weight_dtypes(weight.dtype)
        _checks.require_tensor(
            "position_weight", position_weight, ("L", width), dtypes, weight.device
        )
        _checks.require(
            position_weight.shape[0] >= 1, "position_weight", "L >= 1", position_weight.shape[0]
        )


_FWD = _library.register(
    "byte_pool_fwd(Tensor byte_ids, Tensor weight, Tensor cu_patchlens, Tensor? position_weight, "
    "bool mean, ScalarType out_dtype) -> Tensor",
    launcher="byte_pool.product_impl:launch_fwd",
    meta=lambda weight, cu_patchlens, out_dtype: weight.new_empty(
        (cu_patchlens.shape[0] - 1, weight.shape[1]), dtype=out_dtype
    ),
    flops=lambda byte_ids, weight: byte_ids[0] * weight[1],
)
_BWD = _library.register(
    "byte_pool_bwd(Tensor grad, Tensor byte_ids, Tensor cu_patchlens, bool mean, SymInt vocab, "
    "ScalarType weight_dtype) -> Tensor",
    launcher="byte_pool:launch_bwd",
    meta=lambda grad, vocab, weight_dtype: grad.new_empty(
        (vocab, grad.shape[1]), dtype=weight_dtype
    ),
    flops=lambda grad, byte_ids: byte_ids[0] * grad[1],
)
_BWD_GAIN = _library.register(
    "byte_pool_bwd_gain(Tensor grad, Tensor byte_ids, Tensor weight, Tensor cu_patchlens, "
    "Tensor position_weight, bool mean) -> (Tensor, Tensor)",
    launcher="byte_pool.gain_impl:launch_bwd_gain",
    meta=lambda weight, position_weight: (
        weight.new_empty(weight.shape),
        position_weight.new_empty(position_weight.shape),
    ),
    flops=lambda grad, byte_ids: 4 * byte_ids[0] * grad[1],
)


def _keep(
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    position_weight: Tensor | None,
    mean: bool,
) -> _library.Kept:
    # Without a gain the gradient does not read the table, so the table is not kept.
    table = None if position_weight is None else weight
    sizes = (mean, weight.shape[0], weight.dtype)
    return (byte_ids, cu_patchlens, table, position_weight), sizes


def _gradients(
    needs: Sequence[bool],
    grad: Tensor,
    byte_ids: Tensor,
    cu_patchlens: Tensor,
    weight: Tensor | None,
    position_weight: Tensor | None,
    mean: bool,
    vocab: int,
    weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    if position_weight is not None:
        return _BWD_GAIN(grad, byte_ids, weight, cu_patchlens, position_weight, mean)
    return _BWD(grad, byte_ids, cu_patchlens, mean, vocab, weight_dtype), None


_BytePool = _library.differentiable(
    _FWD, of=("weight", "position_weight"), keep=_keep, gradients=_gradients
)
