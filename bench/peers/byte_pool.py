"""Peers of byte_pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled
from .segment_pool import index_add, patch_of, segment_reduce


def _with_id_dtype(dtype: torch.dtype) -> Callable[[Inputs], Inputs]:
    def convert(inputs: Inputs) -> Inputs:
        boundaries = inputs["cu_patchlens"]
        ids = inputs["byte_ids"][: int(boundaries[-1])]
        return inputs | {"byte_ids": ids.to(dtype), "cu_patchlens": boundaries.to(dtype)}

    return convert


def _with_patch_ids(inputs: Inputs) -> Inputs:
    converted = _with_id_dtype(torch.int64)(inputs)
    return converted | {"patch_ids": patch_of(converted["cu_patchlens"])}


def _no_gain(case: Case) -> str | None:
    return "it has no gain for the position of a byte in its patch" if "L" in case.sizes else None


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
    return segment_reduce(F.embedding(byte_ids, weight), cu_patchlens, mode)


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
    return index_add(embedded, cu_patchlens, patch_ids, mode)


_BAG = Entry("EmbeddingBag", _bag, _with_id_dtype(torch.int32), _no_gain)
_EMBED_SEGMENT_REDUCE = Entry(
    "embedding + segment_reduce", _embed_segment_reduce, _with_id_dtype(torch.int32), _no_gain
)
_EMBED_INDEX_ADD = Entry("embedding + index_add", _embed_index_add, _with_patch_ids)


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
}
