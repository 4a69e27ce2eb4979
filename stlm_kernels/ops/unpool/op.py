"""The public unpool: contract, checks, dispatch."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ... import _checks
from ..._dispatch import Impl, without_kernel
from . import torch_impl


def unpool(
    patch_states: Tensor,  # (P, D)
    read_ids: Tensor,  # (T,) int32
    *,
    null_state: Tensor | None = None,  # (D,)
    residual: Tensor | None = None,  # (T, D)
    impl: Impl = "auto",
) -> Tensor:
    """Give each byte the state of the patch that it may read, plus its own residual.

    out[t] = (patch_states[read_ids[t]] if read_ids[t] >= 0 else null_state) + residual[t].

    With `read_ids` from `find_patches` no byte sees a later one, provided that `residual` comes
    from a causal encoder.

    Args:
        patch_states: (P, D) float32, bfloat16, float16 or float64.
        read_ids: (T,) integers in [-1, P), each id >= 0 in one contiguous run of rows, as
            `find_patches` makes them; -1: no patch can be read yet.
        null_state: (D,) what rows with -1 get, in patch_states' dtype, or float32 beside a 16-bit
            one (rounded to its dtype when loaded). None: zeros.
        residual: (T, D) in patch_states' dtype. None: nothing is added.
        impl: "auto" or "torch"; there is no kernel yet.

    Returns:
        (T, D) in patch_states' dtype, under autocast in the autocast dtype (float32 is then
        rounded when loaded).

    Raises:
        ValueError: a wrong type, dtype, shape or device; on CPU in eager mode also an id >= 0 with
            more than one run.
        IndexError: on CPU in eager mode, an id outside [-1, P).
        NotImplementedError: impl="triton".

    Numerics:
        A gather, exact without a residual. The gradients of patch_states and null_state are sums
        of rows, accumulated in float32 (float64 for float64) in a fixed order and rounded once;
        NaN reaches no patch but its own. Where values are not checked, a row whose id is out of
        range is NaN and reaches no gradient but its residual's. Can be differentiated any number
        of times.

    Source: the upsampling of H-Net (arXiv 2507.07955) and BLT (arXiv 2412.09871), read through
    `read_ids`, which is this project's.
    """
    _checks.require_tensor("patch_states", patch_states, ("P", "D"), _checks.FLOATS)
    width, device = patch_states.shape[1], patch_states.device
    _checks.require(width >= 1, "patch_states", "D >= 1", tuple(patch_states.shape))
    _checks.require_ids("read_ids", read_ids, device)
    if null_state is not None:
        dtypes = _checks.weight_dtypes(patch_states.dtype)
        _checks.require_tensor("null_state", null_state, (width,), dtypes, device)
    if residual is not None:
        dtypes = _checks.activation_dtypes(patch_states)
        shape = (read_ids.shape[0], width)
        _checks.require_tensor("residual", residual, shape, dtypes, device)
    if _checks.values_visible(read_ids):
        _checks.check_id_values("read_ids", read_ids, -1, patch_states.shape[0])
        _check_one_run_each(read_ids)
    without_kernel("unpool", impl, device)
    out_dtype = _checks.output_dtype(patch_states)
    return torch_impl.unpool(patch_states, read_ids, null_state, residual, out_dtype)


def _check_one_run_each(read_ids: Tensor) -> None:
    ids = read_ids.numpy()  # a view; several times cheaper than torch on small integers
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
