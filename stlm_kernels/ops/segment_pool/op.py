"""The public segment_pool: contract, checks, dispatch."""

from __future__ import annotations

from torch import Tensor

from ... import _checks
from ..._dispatch import Impl, without_kernel
from . import torch_impl

MODES = ("mean", "sum", "max", "first", "last")


def segment_pool(
    x: Tensor,  # (T, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    *,
    mode: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Pool the hidden states of the bytes of each patch into one vector.

    out[p] = pool of x[cu_patchlens[p]], ..., x[cu_patchlens[p+1] - 1]: their mean, their sum, their
    maximum by column, the first or the last of them.

    Args:
        x: (T, D) float32, bfloat16, float16 or float64.
        cu_patchlens: (P+1,) int32 patch borders in rows of x, from 0, non-decreasing, at most T.
            Rows from the last border on belong to no patch: they are never read, even when they
            hold NaN, and their gradient is zero.
        mode: "mean", "sum", "max", "first" or "last".
        impl: "auto" or "torch"; there is no kernel yet.

    Returns:
        (P, D) in x's dtype, under autocast in the autocast dtype (float32 is then rounded when
        loaded). Empty patches give zeros and take no gradient, in every mode.

    Raises:
        ValueError: a wrong type, dtype, shape, device or mode; on CPU in eager mode also offsets
            that do not start at 0, decrease, or end beyond T.
        NotImplementedError: impl="triton".

    Numerics:
        Accumulates in float32 (float64 for float64) in a fixed order and rounds once; max, first
        and last are exact. "max": of equal values the first takes the whole gradient; NaN
        propagates, and the first NaN takes the gradient. NaN stays in its own patch. Can be
        differentiated any number of times.

    Source: the pooling of bytes into patches in BLT (arXiv 2412.09871), and the selection of one
    byte's state in H-Net (arXiv 2507.07955) and SpaceByte (arXiv 2404.14408).
    """
    _checks.require_tensor("x", x, ("T", "D"), _checks.FLOATS)
    _checks.require(x.shape[1] >= 1, "x", "D >= 1", tuple(x.shape))
    _checks.require_offsets("cu_patchlens", cu_patchlens, x.device)
    _checks.require_choice("mode", mode, MODES)
    if _checks.values_visible(cu_patchlens):
        _checks.check_offset_values("cu_patchlens", cu_patchlens, x.shape[0])
    without_kernel("segment_pool", impl, x.device)
    return torch_impl.segment_pool(x, cu_patchlens, mode, _checks.output_dtype(x))
