"""The public ema_unpool: contract, checks, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from ..unpool.op import check_read_id_values
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def ema_unpool(
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,) int32
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
    residual: Tensor | None = None,  # (T, D)
    impl: Impl = "auto",
) -> Tensor:
    """Smooth the patch states along each document, then give each byte the one it may read.

    z[j] = gate[j] * patch_states[j] + (1 - gate[j]) * z[j - 1], with z = 0 before a document;
    out[t] = (z[read_ids[t]] if read_ids[t] >= 0 else 0) + residual[t].

    Args:
        patch_states: (P, D) float32, bfloat16 or float16; float64 on the torch path.
        gate: (P,) in [0, 1], in patch_states' dtype or float32, never cast. 0, as of an empty
            patch, hands the state on; 1 starts afresh.
        read_ids: (T,) uint8, int16, int32 or int64 in [-1, P), each id >= 0 in one contiguous run,
            as `find_patches` makes them; -1: nothing to read. Patches pooled from their first byte
            alone may be read through `Patches.patch_ids` as well.
        cu_seqlens: (S+1,) int32 document boundaries in patches, as `Patches.cu_seqlens`. Patches
            from the last on are never read and take no gradient. None: one document.
        residual: (T, D) in patch_states' dtype. None: nothing is added.
        impl: "auto", "triton" or "torch".

    Returns: (T, D) in patch_states' dtype, under autocast in the autocast dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for a gate outside [0, 1] (NaN passes), bad boundaries or an id with two runs; IndexError
        there for an id outside [-1, P); NotImplementedError where impl="triton" cannot run, with
        all reasons.

    >>> ids, gate = torch.tensor([-1, 0, 0, 1]), torch.tensor([1.0, 0.5])
    >>> ema_unpool(torch.tensor([[4.0], [8.0]]), gate, ids).flatten().tolist()
    [0.0, 4.0, 4.0, 6.0]

    Numerics: docs/numerics.md. Source: the dechunking layer of H-Net (arXiv 2507.07955).
    """
    _check_arguments(patch_states, gate, read_ids, cu_seqlens, residual)
    out_dtype = runtime.compute_dtype(patch_states)
    if use_triton(
        "ema_unpool", impl, patch_states.device, unsupported_reasons,
        patch_states=patch_states, gate=gate, read_ids=read_ids, cu_seqlens=cu_seqlens,
        residual=residual,
    ):  # fmt: skip
        return _EmaUnpool.apply(patch_states, gate, read_ids, cu_seqlens, residual, out_dtype)
    return torch_impl.ema_unpool(patch_states, gate, read_ids, cu_seqlens, residual, out_dtype)


def _check_arguments(
    patch_states: Tensor,
    gate: Tensor,
    read_ids: Tensor,
    cu_seqlens: Tensor | None,
    residual: Tensor | None,
) -> None:
    _checks.require_tensor("patch_states", patch_states, ("P", "D"), _checks.FLOATS)
    (patches, width), device = patch_states.shape, patch_states.device
    _checks.require(width >= 1, "patch_states", "D >= 1", tuple(patch_states.shape))
    dtypes = runtime.activation_dtypes(patch_states)
    gate_dtypes = dtypes if torch.float32 in dtypes else (*dtypes, torch.float32)
    _checks.require_tensor("gate", gate, (patches,), gate_dtypes, device)
    _checks.require_ids("read_ids", read_ids, device)
    if cu_seqlens is not None:
        _checks.require_offsets("cu_seqlens", cu_seqlens, device)
    if residual is not None:
        shape = (read_ids.shape[0], width)
        _checks.require_tensor("residual", residual, shape, dtypes, device)
    if runtime.values_visible(read_ids):
        check_read_id_values(read_ids, patches)
    if cu_seqlens is not None and runtime.values_visible(cu_seqlens):
        _checks.check_offset_values("cu_seqlens", cu_seqlens, patches)
    if runtime.values_visible(gate):
        _check_gate_values(gate, cu_seqlens)


def _check_gate_values(gate: Tensor, cu_seqlens: Tensor | None) -> None:
    gate = gate.detach()
    if cu_seqlens is not None and runtime.values_visible(cu_seqlens):
        gate = gate[: int(cu_seqlens[-1])]
    outside = (gate < 0) | (gate > 1)
    if outside.any():
        position = int(outside.nonzero()[0])
        raise ValueError(
            f"gate: expected values in [0, 1], got {float(gate[position])} at position {position}"
        )


_FWD = _library.register(
    "ema_unpool_fwd(Tensor patch_states, Tensor gate, Tensor read_ids, Tensor? cu_seqlens, "
    "Tensor? residual, ScalarType out_dtype) -> Tensor",
    launcher="ema_unpool:launch_fwd",
    meta=lambda patch_states, read_ids, out_dtype: patch_states.new_empty(
        (read_ids.shape[0], patch_states.shape[1]), dtype=out_dtype
    ),
    flops=lambda patch_states, read_ids: (3 * patch_states[0] + read_ids[0]) * patch_states[1],
)
_BWD = _library.register(
    "ema_unpool_bwd(Tensor grad, Tensor patch_states, Tensor gate, Tensor read_ids, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    launcher="ema_unpool:launch_bwd",
    meta=lambda patch_states, gate: _library.empty_like(patch_states, gate),
    flops=lambda grad, patch_states: (grad[0] + 9 * patch_states[0]) * patch_states[1],
)


def _gradients(
    needs: Sequence[bool], grad: Tensor, *saved: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *tensors, residual_dtype = saved
    dstates, dgate = _BWD(grad, *tensors) if needs[0] or needs[1] else (None, None)
    return dstates, dgate, grad.to(residual_dtype) if needs[2] else None


_EmaUnpool = _library.differentiable(
    _FWD,
    of=("patch_states", "gate", "residual"),
    keep=lambda patch_states, gate, read_ids, cu_seqlens, residual: (
        (patch_states, gate, read_ids, cu_seqlens),
        (None if residual is None else residual.dtype,),
    ),
    gradients=_gradients,
)
