"""Peers of attention_pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Inputs

from .entry import Entry, compiled

MOST_BATCH = 65_535
"""Largest second and third dimension of a CUDA grid, and with it of some SDPA backends."""


def _with_padded_patches(inputs: Inputs) -> Inputs:
    """Lay out the bytes of each patch in a padded (P, Lmax) rectangle, with its mask."""
    boundaries = inputs["cu_patchlens"].long()
    lengths = boundaries.diff()
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    slots = torch.arange(longest, device=boundaries.device)
    inside = slots < lengths[:, None]
    converted = {name: x for name, x in inputs.items() if name != "cu_patchlens"}
    return converted | {
        "rows": torch.where(inside, boundaries[:-1, None] + slots, 0),
        "filled": (lengths > 0)[:, None, None],
        "inside": inside | (slots == 0),  # an empty patch attends to a byte, so that nothing is NaN
    }


def _padded_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    inside: Tensor,
    filled: Tensor,
    scale: float | None,
) -> Tensor:
    queries = query.expand(len(rows), *query.shape[-2:])[:, :, None]
    out = [
        F.scaled_dot_product_attention(
            q, key[at].transpose(1, 2), value[at].transpose(1, 2), mask, scale=scale,
            enable_gqa=query.shape[-2] != key.shape[1],
        )[:, :, 0]
        for q, at, mask in zip(
            queries.split(MOST_BATCH), rows.split(MOST_BATCH),
            inside[:, None, None].split(MOST_BATCH), strict=True,
        )
    ]  # fmt: skip
    return torch.where(filled, torch.cat(out), 0)


def _with_patch_ids(inputs: Inputs) -> Inputs:
    boundaries = inputs["cu_patchlens"].long()
    end = int(boundaries[-1])
    rows = {name: inputs[name][:end] for name in ("key", "value")}
    return inputs | rows | {"patch_ids": torch.repeat_interleave(boundaries.diff())}


def _scatter_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_patchlens: Tensor,
    patch_ids: Tensor,
    scale: float | None,
) -> Tensor:
    (heads, width), kv_heads = query.shape[-2:], key.shape[1]
    patches = len(cu_patchlens) - 1
    own = query.unflatten(-2, (kv_heads, heads // kv_heads))
    if query.ndim == 3:
        own = own.index_select(0, patch_ids)
    scores = (own * key[:, :, None]).sum(-1).float() * (width**-0.5 if scale is None else scale)
    index = patch_ids[:, None, None].expand(scores.shape)
    zeros = scores.new_zeros(patches, *scores.shape[1:])
    top = zeros.scatter_reduce(0, index, scores.detach(), "amax", include_self=False)
    weights = (scores - top.index_select(0, patch_ids)).exp()
    norm = zeros.index_add(0, patch_ids, weights).index_select(0, patch_ids)
    weighted = (weights / norm)[..., None] * value[:, :, None]
    pooled = weighted.new_zeros(patches, *weighted.shape[1:]).index_add(0, patch_ids, weighted)
    return pooled.flatten(1, 2).to(key.dtype)


_PADDED_SDPA = Entry("padded SDPA", _padded_sdpa, _with_padded_patches)
_SCATTER_SOFTMAX = Entry("scatter softmax", _scatter_softmax, _with_patch_ids)

PEERS: dict[str, tuple[Entry, ...]] = {
    "attention_pool": (
        _PADDED_SDPA,
        _SCATTER_SOFTMAX,
        compiled(_SCATTER_SOFTMAX),
        compiled(_PADDED_SDPA),
    ),
}
