"""attention_pool in aten ops: a softmax over the bytes of each patch, by the patch of each byte.

Nothing has a place for every byte of the longest patch, so one long patch costs what its bytes
cost. Sums over patches and their counterpart, a patch's row handed to each of its bytes, are each
other's gradient; both keep their order and can be differentiated any number of times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import runtime
from ..._torch import segments
from ..._torch.casting import cast
from ..._torch.function import Function


def attention_pool(
    query: Tensor,  # (H, K) or (P, H, K)
    key: Tensor,  # (T, H_kv, K)
    value: Tensor,  # (T, H_kv, K)
    cu_patchlens: Tensor,  # (P+1,) int32
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """(P, H, K) in `out_dtype`."""
    wide = torch.promote_types(out_dtype, torch.float32)
    query, key, value = (cast(x, out_dtype, wide) for x in (query, key, value))
    total = key.shape[0]
    with runtime.without_autocast(key):
        if runtime.values_visible(cu_patchlens):
            total = int(cu_patchlens[-1])
            patches = _Patches.of(cu_patchlens, total)
            return _pool(query, key[:total], value[:total], patches, scale).to(out_dtype)
        boundaries = segments.clamped_bounds(cu_patchlens, total)
        # Rows of no patch get a patch of their own at each end, and zeros to read.
        rows = torch.arange(total, device=key.device)
        inside = ((rows >= boundaries[0]) & (rows < boundaries[-1]))[:, None, None]
        key, value = torch.where(inside, key, 0), torch.where(inside, value, 0)
        if query.ndim == 3:
            query = F.pad(query, (0, 0, 0, 0, 1, 1))
        # Not F.pad: it makes a Python number of `total`, and compiled code would fix T.
        boundaries = torch.cat(
            [boundaries.new_zeros(1), boundaries, boundaries.new_full((1,), total)]
        )
        pooled = _pool(query, key, value, _Patches.of(boundaries, total), scale)
        return pooled[1:-1].to(out_dtype)


class _Patches(NamedTuple):
    """Patches that cover all rows."""

    boundaries: Tensor  # (P+1,) int32
    of_row: Tensor  # (T,) int64

    @classmethod
    def of(cls, boundaries: Tensor, total: int) -> _Patches:
        return cls(boundaries, segments.segment_of_row(boundaries.long(), total))


def _pool(query: Tensor, key: Tensor, value: Tensor, patches: _Patches, scale: float) -> Tensor:
    """(P, H, K) in float32 or better."""
    kv_heads = key.shape[1]
    query = query.unflatten(-2, (kv_heads, query.shape[-2] // kv_heads)) * scale
    own = query if query.ndim == 3 else _spread(query, patches)
    # Not a matrix product: its gradient of a shared query would be one long sum, in one go.
    scores = (own * key[:, :, None]).sum(-1)
    weighted = _softmax(scores, patches)[..., None] * value[:, :, None]
    return _sum(weighted.flatten(1, 2), patches)


def _softmax(scores: Tensor, patches: _Patches) -> Tensor:
    """Softmax of (T, ...) over the rows of each patch."""
    with torch.no_grad():
        top = _largest(scores, patches).index_select(0, patches.of_row)
    weights = (scores - top).exp()
    return weights / _spread(_sum(weights, patches), patches)


def _largest(x: Tensor, patches: _Patches) -> Tensor:
    """(T, ...) -> (P, ...)."""
    if not _is_traced(x):
        boundaries = patches.boundaries.long()
        return torch.segment_reduce(x, "max", offsets=boundaries, unsafe=True)
    index = patches.of_row.view(-1, *[1] * (x.ndim - 1)).expand(x.shape)
    largest = x.new_zeros(patches.boundaries.shape[0] - 1, *x.shape[1:])
    return largest.scatter_reduce(0, index, x, "amax", include_self=False)


def _sum(x: Tensor, patches: _Patches) -> Tensor:
    """(T, ...) -> (P, ...), the sum of each patch's rows."""
    count = patches.boundaries.shape[0] - 1
    if _is_traced(x):
        return x.new_zeros(count, *x.shape[1:]).index_add(0, patches.of_row, x)
    return _Sum.apply(x.flatten(1), *patches).unflatten(1, x.shape[1:])


def _spread(x: Tensor, patches: _Patches) -> Tensor:
    """(P, ...) -> (T, ...), to each row what its patch has."""
    if _is_traced(x):
        return x.index_select(0, patches.of_row)
    return _Spread.apply(x.flatten(1), *patches).unflatten(1, x.shape[1:])


def _is_traced(x: Tensor) -> bool:
    """Return whether only ops that torch differentiates will do: EmbeddingBag has no batching rule
    and no forward-mode derivative."""
    if torch.compiler.is_compiling() or runtime.many_at_once(x):
        return True
    return runtime.carries_tangents(x)


class _Sum(Function):
    """EmbeddingBag over rows 0, 1, 2, ..., the fastest segment sum torch has on a CPU."""

    @staticmethod
    def forward(x: Tensor, boundaries: Tensor, of_row: Tensor) -> Tensor:
        return segments.segment_sum(x, boundaries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0], _Patches(*ctx.saved_tensors)), None, None


class _Spread(Function):
    """A gather by row."""

    @staticmethod
    def forward(x: Tensor, boundaries: Tensor, of_row: Tensor) -> Tensor:
        return x.index_select(0, of_row)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grads[0], _Patches(*ctx.saved_tensors)), None, None
