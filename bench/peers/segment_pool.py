"""Peers of segment_pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled


def patch_of(cu_patchlens: Tensor) -> Tensor:  # (T,) int64
    return torch.repeat_interleave(cu_patchlens.diff())


def _segment_inputs(inputs: Inputs) -> Inputs:
    boundaries = inputs["cu_patchlens"].long()
    return {"x": inputs["x"], "cu_patchlens": boundaries, "mode": inputs["mode"]}


def _segment_inputs_with_patch_ids(inputs: Inputs) -> Inputs:
    converted = _segment_inputs(inputs)
    return converted | {"patch_ids": patch_of(converted["cu_patchlens"])}


def _only(*modes: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        return None if case["mode"] in modes else f"it has no mode {case['mode']!r}"

    return unsupported


def segment_reduce(x: Tensor, cu_patchlens: Tensor, mode: str) -> Tensor:
    initial = None if mode in ("max", "min") else 0
    pooled = torch.segment_reduce(
        x, mode, offsets=cu_patchlens, axis=0, unsafe=True, initial=initial
    )
    if initial is None:  # an empty segment gives -inf, or inf
        pooled = torch.where(cu_patchlens.diff()[:, None] > 0, pooled, 0)
    return pooled


def index_add(x: Tensor, cu_patchlens: Tensor, patch_ids: Tensor, mode: str) -> Tensor:
    lengths = cu_patchlens.diff()
    zeros = x.new_zeros(len(lengths), x.shape[1])
    pooled = zeros.index_add(0, patch_ids, x[: len(patch_ids)])
    return pooled / lengths.clamp(min=1)[:, None] if mode == "mean" else pooled


def _scatter_reduce(x: Tensor, cu_patchlens: Tensor, patch_ids: Tensor, mode: str) -> Tensor:
    x = x[: len(patch_ids)]
    zeros = x.new_zeros(len(cu_patchlens) - 1, x.shape[1])
    index = patch_ids[:, None].expand_as(x)
    reduce = f"a{mode}" if mode in ("max", "min") else mode
    return zeros.scatter_reduce(0, index, x, reduce, include_self=False)


def _edge_gather(x: Tensor, cu_patchlens: Tensor, mode: str) -> Tensor:
    starts, ends = cu_patchlens[:-1], cu_patchlens[1:]
    rows = (starts if mode == "first" else ends - 1).clamp(0, len(x) - 1)
    return torch.where((ends > starts)[:, None], x[rows], 0)


_EDGES = Entry("gather of edges", _edge_gather, _segment_inputs, _only("first", "last"))
_TIES = "it splits the gradient of equal extremes, where the op gives it to the first"
_INDEX_ADD = Entry("index_add", index_add, _segment_inputs_with_patch_ids, _only("mean", "sum"))
_SEGMENT_REDUCE = Entry(
    "segment_reduce",
    segment_reduce,
    _segment_inputs,
    _only("mean", "sum", "max", "min"),
    loose_gradients=_TIES,
)
_SCATTER_REDUCE = Entry(
    "scatter_reduce",
    _scatter_reduce,
    _segment_inputs_with_patch_ids,
    _only("mean", "sum", "max", "min"),
    loose_gradients=_TIES,
)


PEERS: dict[str, tuple[Entry, ...]] = {
    "segment_pool": (
        _SEGMENT_REDUCE,
        _INDEX_ADD,
        _SCATTER_REDUCE,
        _EDGES,
        compiled(_INDEX_ADD),
        compiled(_SEGMENT_REDUCE),
        compiled(_SCATTER_REDUCE),
        compiled(_EDGES),
    ),
}
