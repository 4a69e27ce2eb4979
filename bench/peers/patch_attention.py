"""Peers of patch_attention: folded batches, SDPA by patch, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .attention import flex, flex_inputs, heads_first, made_block_mask, sdpa
from .attention_varlen import PATCH_VARLEN
from .entry import Entry, compiled
from .installed import on_gpu


def _fold_inputs(inputs: Inputs) -> Inputs:
    """Give the byte of each slot of each patch; empty slots repeat the first."""
    boundaries = inputs["cu_patchlens"].long()
    starts, lengths = boundaries[:-1], boundaries.diff()
    slots = torch.arange(int(lengths.max()), device=boundaries.device)
    valid = slots < lengths[:, None]
    indices = starts[:, None] + torch.where(valid, slots, 0)
    own = {name: inputs[name] for name in ("q", "k", "v", "causal", "scale")}
    return own | {"indices": indices.clamp(max=inputs["q"].shape[0] - 1), "valid": valid}


def _one_length(case: Case) -> str | None:
    return None if case["boundaries"] == "even" and case["T"] % case["P"] == 0 else "ragged patches"


def _short(case: Case) -> str | None:
    return None if case["T"] // case["P"] <= 64 else "its padding does not fit for long patches"


def _fold(x: Tensor, indices: Tensor, valid: Tensor, padded: bool) -> Tensor:
    """Fold bytes into (P, H, L, K); patches of one length need no gather."""
    shape = (*indices.shape, *x.shape[1:])
    x = x.index_select(0, indices.flatten()).view(shape) if padded else x.view(shape)
    return x.transpose(1, 2)


def _visible(valid: Tensor, causal: bool) -> Tensor:
    """Return a bool mask (P, 1, L or 1, L), True where a query may attend."""
    seen = valid[:, None, None]
    length = valid.shape[1]
    return seen & seen.new_ones(length, length).tril() if causal else seen


def _unfold(out: Tensor, indices: Tensor, valid: Tensor, padded: bool, total: int) -> Tensor:
    flat = out.transpose(1, 2).flatten(0, 1)
    if not padded:
        return flat
    kept = valid.flatten()
    return flat.new_zeros(total, *flat.shape[1:]).index_copy(0, indices.flatten()[kept], flat[kept])


def _folded(
    attend: Callable[..., Tensor], padded: bool, q: Tensor, k: Tensor, v: Tensor,
    indices: Tensor, valid: Tensor, causal: bool, scale: float | None,
) -> Tensor:  # fmt: skip
    total = q.shape[0]
    q, k, v = (_fold(x, indices, valid, padded) for x in (q, k, v))
    seen = _visible(valid, causal) if padded or causal else None
    return _unfold(attend(q, k, v, seen, scale), indices, valid, padded, total)


def _folded_sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None
) -> Tensor:
    if seen is not None:
        seen = seen | ~seen.any(-1, keepdim=True)
        seen = seen.expand(-1, 1, q.shape[2], -1)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=grouped)


def _folded_bmm(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~(seen | ~seen.any(-1, keepdim=True)), float("-inf"))
    return scores.softmax(-1) @ v


def _patch_block_mask(inputs: Inputs) -> Inputs:
    q, boundaries = inputs["q"], inputs["cu_patchlens"]
    if inputs["causal"]:
        return flex_inputs(inputs | {"window": None, "cu_seqlens": boundaries})
    total = q.shape[0]
    patch = torch.searchsorted(boundaries.long(), torch.arange(total, device=q.device), right=True)

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return patch[row] == patch[key]

    return heads_first(inputs) | {"block_mask": made_block_mask(seen, total, q.device)}


def _by_patch(
    q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], causal: bool, scale: float | None
) -> Tensor:
    parts = [
        sdpa(q[None, a:b], k[None, a:b], v[None, a:b], scale, True, is_causal=causal)
        for a, b in pairwise(boundaries)
        if b > a
    ]
    return torch.cat(parts)


def _with_boundaries(inputs: Inputs) -> Inputs:
    own = {name: inputs[name] for name in ("q", "k", "v", "causal", "scale")}
    return own | {"boundaries": inputs["cu_patchlens"].tolist()}


def _few_patches(case: Case) -> str | None:
    return None if case["P"] <= 64 else f"{case['P']} calls"


_EVEN_BMM = Entry(
    "batch fold, bmm", partial(_folded, _folded_bmm, False), _fold_inputs, _one_length
)

PEERS: dict[str, tuple[Entry, ...]] = {
    "patch_attention": (
        _EVEN_BMM,
        Entry("batch fold, SDPA", partial(_folded, _folded_sdpa, False), _fold_inputs, _one_length),
        Entry("padded fold, bmm", partial(_folded, _folded_bmm, True), _fold_inputs, _short),
        Entry("padded fold, SDPA", partial(_folded, _folded_sdpa, True), _fold_inputs, _short),
        Entry("SDPA by patch", _by_patch, _with_boundaries, _few_patches),
        PATCH_VARLEN,
        Entry("FlexAttention", flex, _patch_block_mask, on_gpu, compiled=True),
        compiled(_EVEN_BMM),
    ),
}
