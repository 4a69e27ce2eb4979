"""What each op is measured against: stock PyTorch compositions, written by us.

A peer gets its inputs in the form that suits it best (`convert` is not timed): ids in the dtype it
is fastest with, the patch of each byte where it needs one. It must compute what the op computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels._spec import Case, Inputs

from . import (
    attention_peers,
    decode_peers,
    ema_peers,
    head_peers,
    ngram_peers,
    patch_peers,
    pool_peers,
    rope_peers,
    sample_peers,
)
from .entry import Entry, compiled


def _patch_of(cu_patchlens: Tensor) -> Tensor:  # (T,) int64
    return torch.repeat_interleave(cu_patchlens.diff())


# byte_pool


def _with_id_dtype(dtype: torch.dtype) -> Callable[[Inputs], Inputs]:
    def convert(inputs: Inputs) -> Inputs:
        borders = inputs["cu_patchlens"]
        ids = inputs["byte_ids"][: int(borders[-1])]
        return inputs | {"byte_ids": ids.to(dtype), "cu_patchlens": borders.to(dtype)}

    return convert


def _with_patch_ids(inputs: Inputs) -> Inputs:
    converted = _with_id_dtype(torch.int64)(inputs)
    return converted | {"patch_ids": _patch_of(converted["cu_patchlens"])}


def _no_gain(case: Case) -> str | None:
    return "it has no gain for the place of a byte in its patch" if "L" in case.sizes else None


def _mean_without_gain(case: Case) -> str | None:
    return _no_gain(case) or ("a sum needs no scale" if case["mode"] == "sum" else None)


def _bag(byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, mode: str) -> Tensor:
    return F.embedding_bag(byte_ids, weight, cu_patchlens, mode=mode, include_last_offset=True)


def _bag_sum_scaled(byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, mode: str) -> Tensor:
    scales = cu_patchlens.diff().clamp(min=1).to(weight.dtype).reciprocal()
    return _bag(byte_ids, weight, cu_patchlens, "sum") * scales[:, None]


def _embed_segment_reduce(
    byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, mode: str
) -> Tensor:
    return _segment_reduce(F.embedding(byte_ids, weight), cu_patchlens, mode)


def _embed_index_add(
    byte_ids: Tensor,
    weight: Tensor,
    cu_patchlens: Tensor,
    patch_ids: Tensor,
    mode: str,
    position_weight: Tensor | None = None,
) -> Tensor:
    embedded = F.embedding(byte_ids, weight)
    if position_weight is not None:
        slots = torch.arange(len(byte_ids), device=byte_ids.device) - cu_patchlens[patch_ids]
        embedded = (
            embedded * position_weight.to(weight.dtype)[slots.clamp(max=len(position_weight) - 1)]
        )
    return _index_add(embedded, cu_patchlens, patch_ids, mode)


_BAG = Entry("EmbeddingBag", _bag, _with_id_dtype(torch.int32), _no_gain)
_EMBED_SEGMENT_REDUCE = Entry(
    "embedding + segment_reduce", _embed_segment_reduce, _with_id_dtype(torch.int32), _no_gain
)
_EMBED_INDEX_ADD = Entry("embedding + index_add", _embed_index_add, _with_patch_ids)


# segment_pool


def _segment_inputs(inputs: Inputs) -> Inputs:
    borders = inputs["cu_patchlens"].long()
    return {"x": inputs["x"], "cu_patchlens": borders, "mode": inputs["mode"]}


def _segment_inputs_with_patch_ids(inputs: Inputs) -> Inputs:
    converted = _segment_inputs(inputs)
    return converted | {"patch_ids": _patch_of(converted["cu_patchlens"])}


def _only(*modes: str) -> Callable[[Case], str | None]:
    def unsupported(case: Case) -> str | None:
        return None if case["mode"] in modes else f"it has no mode {case['mode']!r}"

    return unsupported


def _segment_reduce(x: Tensor, cu_patchlens: Tensor, mode: str) -> Tensor:
    initial = None if mode in ("max", "min") else 0
    pooled = torch.segment_reduce(
        x, mode, offsets=cu_patchlens, axis=0, unsafe=True, initial=initial
    )
    if initial is None:  # an empty segment gives -inf, or inf
        pooled = torch.where(cu_patchlens.diff()[:, None] > 0, pooled, 0)
    return pooled


def _index_add(x: Tensor, cu_patchlens: Tensor, patch_ids: Tensor, mode: str) -> Tensor:
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
_INDEX_ADD = Entry("index_add", _index_add, _segment_inputs_with_patch_ids, _only("mean", "sum"))
_SEGMENT_REDUCE = Entry(
    "segment_reduce",
    _segment_reduce,
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


# unpool


def _with_table_rows(inputs: Inputs) -> Inputs:
    """Row 0 of the table is the null state, so that one gather serves every byte."""
    converted = {name: value for name, value in inputs.items() if name != "read_ids"}
    return converted | {"rows": inputs["read_ids"].long() + 1}


def _null_and_states(patch_states: Tensor, null_state: Tensor | None) -> Tensor:
    null = patch_states.new_zeros(patch_states.shape[1]) if null_state is None else null_state
    return torch.cat([null[None].to(patch_states.dtype), patch_states])


def _unpool_index_select(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    gathered = _null_and_states(patch_states, null_state).index_select(0, rows)
    return gathered if residual is None else gathered + residual


def _unpool_embedding(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    gathered = F.embedding(rows, _null_and_states(patch_states, null_state))
    return gathered if residual is None else gathered + residual


def _unpool_where(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    null = 0 if null_state is None else null_state.to(patch_states.dtype)
    gathered = patch_states.index_select(0, (rows - 1).clamp(min=0))
    gathered = torch.where((rows > 0)[:, None], gathered, null)
    return gathered if residual is None else gathered + residual


_INDEX_SELECT = Entry("index_select + add", _unpool_index_select, _with_table_rows)
_UNPOOL_WHERE = Entry("gather + where + add", _unpool_where, _with_table_rows)


PEERS: dict[str, tuple[Entry, ...]] = {
    "byte_pool": (
        _BAG,
        replace(_BAG, name="EmbeddingBag, int64 ids", convert=_with_id_dtype(torch.int64)),
        Entry(
            "EmbeddingBag sum, scaled",
            _bag_sum_scaled,
            _with_id_dtype(torch.int32),
            _mean_without_gain,
        ),
        _EMBED_SEGMENT_REDUCE,
        _EMBED_INDEX_ADD,
        compiled(_BAG),
        compiled(_EMBED_SEGMENT_REDUCE),
        compiled(_EMBED_INDEX_ADD),
    ),
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
    "unpool": (
        _INDEX_SELECT,
        Entry("embedding + add", _unpool_embedding, _with_table_rows),
        _UNPOOL_WHERE,
        compiled(_INDEX_SELECT),
        compiled(_UNPOOL_WHERE),
    ),
    **attention_peers.PEERS,
    **decode_peers.PEERS,
    **ema_peers.PEERS,
    **head_peers.PEERS,
    **ngram_peers.PEERS,
    **patch_peers.PEERS,
    **pool_peers.PEERS,
    **rope_peers.PEERS,
    **sample_peers.PEERS,
}
