"""The public segment_pool: contract, checks, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons

MODES = ("mean", "sum", "max", "min", "first", "last")
EXTREMES = ("max", "min")


@named_errors
def segment_pool(
    x: Tensor,  # (T, D)
    cu_patchlens: Tensor,  # (P+1,) int32
    *,
    mode: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Pool the hidden states of the bytes of each patch into one vector.

    out[p] = pool of x[cu_patchlens[p]], ..., x[cu_patchlens[p+1] - 1]: their mean, their sum, their
    maximum or minimum by column, the first or the last of them.

    Args:
        x: (T, D) float32, bfloat16 or float16; float64 on the torch path.
        cu_patchlens: (P+1,) int32 patch boundaries in rows of x: from 0, non-decreasing, at most T.
            Rows from the last boundary on are never read, even where they are NaN; their gradient
            is zero.
        mode: "mean", "sum", "max", "min", "first" or "last".
        impl: "auto", "triton" or "torch".

    Returns: (P, D) in x's dtype, under autocast in the autocast dtype. Empty patches give zeros and
        take no gradient, in every mode.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for bad boundaries; NotImplementedError where impl="triton" cannot run, with all reasons.

    >>> x = torch.tensor([[1.0], [2.0], [6.0], [5.0]])
    >>> segment_pool(x, torch.tensor([0, 3, 4], dtype=torch.int32), mode="mean").tolist()
    [[3.0], [5.0]]

    Numerics: docs/numerics.md. Source: the pooling of bytes into patches in BLT (arXiv 2412.09871);
    one byte's state in H-Net (arXiv 2507.07955) and SpaceByte (arXiv 2404.14408).
    """
    _checks.require_tensor("x", x, ("T", "D"), _checks.FLOATS)
    _checks.require(x.shape[1] >= 1, "x", "D >= 1", tuple(x.shape))
    _checks.require_offsets("cu_patchlens", cu_patchlens, x.device)
    _checks.require_choice("mode", mode, MODES)
    if runtime.values_visible(cu_patchlens):
        _checks.check_offset_values("cu_patchlens", cu_patchlens, x.shape[0])
    out_dtype = runtime.compute_dtype(x)
    if use_triton(
        "segment_pool", impl, x.device, unsupported_reasons,
        x=x, cu_patchlens=cu_patchlens, mode=mode,
    ):  # fmt: skip
        return _SegmentPool.apply(x, cu_patchlens, mode, out_dtype)[0]
    return torch_impl.segment_pool(x, cu_patchlens, mode, out_dtype)


def _fwd_meta(
    x: Tensor, cu_patchlens: Tensor, mode: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (cu_patchlens.shape[0] - 1, x.shape[1])
    rows = x.new_empty(shape if mode in EXTREMES else 0, dtype=torch.int32)
    return x.new_empty(shape, dtype=out_dtype), rows


_FWD = _library.register(
    "segment_pool_fwd(Tensor x, Tensor cu_patchlens, str mode, ScalarType out_dtype) "
    "-> (Tensor out, Tensor rows)",
    launcher="segment_pool:launch_fwd",
    meta=_fwd_meta,
    flops=lambda x: x[0] * x[1],
)
_BWD = _library.register(
    "segment_pool_bwd(Tensor grad, Tensor cu_patchlens, Tensor rows, str mode, SymInt total, "
    "ScalarType dtype) -> Tensor",
    launcher="segment_pool:launch_bwd",
    meta=lambda grad, total, dtype: grad.new_empty((total, grad.shape[1]), dtype=dtype),
    flops=lambda grad, total: total * grad[1],
)
_SegmentPool = _library.differentiable(
    _FWD,
    of=("x",),
    keep=lambda x, cu_patchlens, mode, rows: ((cu_patchlens, rows), (mode, x.shape[0], x.dtype)),
    gradients=lambda needs, *given: _BWD(*given),
)
