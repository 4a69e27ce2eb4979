"""The public unpool: contract, checks, dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ... import _checks, _library, runtime
from ..._dispatch import Impl, use_triton
from ..._errors import named_errors
from . import torch_impl
from .config import unsupported_reasons


@named_errors
def unpool(
    patch_states: Tensor,  # (P, D)
    read_ids: Tensor,  # (T,) int32
    *,
    null_state: Tensor | None = None,  # (D,)
    residual: Tensor | None = None,  # (T, D)
    impl: Impl = "auto",
) -> Tensor:
    """Give each byte the state of the patch that it may read, plus its own residual.

    out[t] = (patch_states[read_ids[t]] if read_ids[t] >= 0 else null_state) + residual[t]. With
    `read_ids` from `find_patches` and a `residual` from a causal encoder no byte sees a later one.

    Args:
        patch_states: (P, D) float32, bfloat16 or float16; float64 on the torch path.
        read_ids: (T,) uint8, int16, int32 or int64 in [-1, P), each id >= 0 in one contiguous run,
            as `find_patches` makes them; -1: nothing to read yet.
        null_state: (D,) the state read where the id is -1, in patch_states' dtype, or float32
            beside a 16-bit one (cast to its dtype when loaded). None: zeros.
        residual: (T, D) in patch_states' dtype. None: nothing is added.
        impl: "auto", "triton" or "torch".

    Returns: (T, D) in patch_states' dtype, under autocast in the autocast dtype.
    Raises: ValueError for a wrong type, dtype, shape, device or option, on CPU in eager mode also
        for an id with two runs; IndexError there for an id outside [-1, P); NotImplementedError
        where impl="triton" cannot run, with all reasons.

    >>> ids = torch.tensor([-1, 0, 0, 1])
    >>> unpool(torch.tensor([[4.0], [8.0]]), ids).flatten().tolist()
    [0.0, 4.0, 4.0, 8.0]

    Numerics: docs/numerics.md. Source: the upsampling of H-Net (arXiv 2507.07955) and BLT
    (arXiv 2412.09871), read through `read_ids`, which is this project's.
    """
    _checks.require_tensor("patch_states", patch_states, ("P", "D"), _checks.FLOATS)
    width, device = patch_states.shape[1], patch_states.device
    _checks.require(width >= 1, "patch_states", "D >= 1", tuple(patch_states.shape))
    _checks.require_ids("read_ids", read_ids, device)
    if null_state is not None:
        dtypes = _checks.weight_dtypes(patch_states.dtype)
        _checks.require_tensor("null_state", null_state, (width,), dtypes, device)
    if residual is not None:
        dtypes = runtime.activation_dtypes(patch_states)
        shape = (read_ids.shape[0], width)
        _checks.require_tensor("residual", residual, shape, dtypes, device)
    if runtime.values_visible(read_ids):
        check_read_id_values(read_ids, patch_states.shape[0])
    out_dtype = runtime.compute_dtype(patch_states)
    if use_triton(
        "unpool", impl, device, unsupported_reasons,
        patch_states=patch_states, read_ids=read_ids, null_state=null_state, residual=residual,
    ):  # fmt: skip
        return _Unpool.apply(patch_states, read_ids, null_state, residual, out_dtype)
    return torch_impl.unpool(patch_states, read_ids, null_state, residual, out_dtype)


def check_read_id_values(read_ids: Tensor, n_patches: int) -> None:
    """IndexError for an id outside [-1, n_patches), ValueError for one with two runs of rows."""
    _checks.check_id_values("read_ids", read_ids, -1, n_patches)
    ids = read_ids.numpy()  # a view; several times cheaper than torch on small integers
    if _only_rises(ids):
        return
    begins = np.flatnonzero(np.concatenate([ids[:1] >= 0, ids[1:] != ids[:-1]]))
    begins = begins[ids[begins] >= 0]
    runs = ids[begins]
    if (runs[1:] > runs[:-1]).all():
        return
    _, first_runs = np.unique(runs, return_index=True)
    if len(first_runs) < len(runs):
        position = int(np.delete(begins, first_runs)[0])
        raise ValueError(
            f"read_ids: expected one contiguous run for each id >= 0, got another run of "
            f"{ids[position]} at position {position}"
        )


def _only_rises(ids: np.ndarray) -> bool:  # type: ignore[type-arg]
    """Return whether ids fall only to -1, and then go on above where they were, as documents do."""
    falls = np.flatnonzero(ids[1:] < ids[:-1]) + 1
    if len(falls) == 0:
        return True
    if (ids[falls] >= 0).any():
        return False
    rises = np.flatnonzero((ids[1:] >= 0) & (ids[:-1] < 0)) + 1
    rises = rises[rises > falls[0]]  # one follows each fall, but for the last perhaps
    return bool((ids[rises] > ids[falls[: len(rises)] - 1]).all())


_FWD = _library.register(
    "unpool_fwd(Tensor patch_states, Tensor read_ids, Tensor? null_state, Tensor? residual, "
    "ScalarType out_dtype) -> Tensor",
    launcher="unpool:launch_fwd",
    meta=lambda patch_states, read_ids, out_dtype: patch_states.new_empty(
        (read_ids.shape[0], patch_states.shape[1]), dtype=out_dtype
    ),
    flops=lambda patch_states, read_ids: read_ids[0] * patch_states[1],
)
_BWD = _library.register(
    "unpool_bwd(Tensor grad, Tensor read_ids, SymInt patches, ScalarType dtype) -> Tensor",
    launcher="unpool:launch_bwd",
    meta=lambda grad, patches, dtype: grad.new_empty((patches, grad.shape[1]), dtype=dtype),
    flops=lambda grad: grad[0] * grad[1],
)
_BWD_NULL = _library.register(
    "unpool_bwd_null(Tensor grad, Tensor read_ids, ScalarType dtype) -> Tensor",
    launcher="unpool:launch_bwd_null",
    meta=lambda grad, dtype: grad.new_empty(grad.shape[1], dtype=dtype),
    flops=lambda grad: grad[0] * grad[1],
)


def _keep(
    patch_states: Tensor, read_ids: Tensor, null_state: Tensor | None, residual: Tensor | None
) -> _library.Kept:
    dtypes = [None if x is None else x.dtype for x in (patch_states, null_state, residual)]
    return (read_ids,), (patch_states.shape[0], *dtypes)


def _gradients(
    needs: Sequence[bool], grad: Tensor, read_ids: Tensor, patches: int, *dtypes: torch.dtype
) -> tuple[Tensor | None, ...]:
    return (
        _BWD(grad, read_ids, patches, dtypes[0]) if needs[0] else None,
        _BWD_NULL(grad, read_ids, dtypes[1]) if needs[1] else None,
        grad.to(dtypes[2]) if needs[2] else None,
    )


_Unpool = _library.differentiable(
    _FWD, of=("patch_states", "null_state", "residual"), keep=_keep, gradients=_gradients
)
