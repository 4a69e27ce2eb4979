"""Stock ways to attention: SDPA and its backends, FlexAttention, folded batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stlm_kernels._spec import Case, Inputs
from stlm_kernels.ops.attention.reference import borders_of, seen_mask

from .entry import Entry, compiled, lengths_of
from .others import on_gpu, own_keys
from .packed_peers import FLA, PATCH_VARLEN, VARLEN
from .window_peers import BLOCKS

DENSE_ROWS = 16_384
"""Rows beyond which a mask of all scores, or the scores themselves, do not fit beside the rest."""


# attention


def _heads_first(inputs: Inputs) -> Inputs:
    """Contiguous (B, H, T, K): what SDPA likes best."""
    operands = {name: inputs[name] for name in ("q", "k", "v")}
    if operands["q"].dim() == 3:
        operands = {name: x[None] for name, x in operands.items()}
    return {**operands, "scale": inputs["scale"], "packed": inputs["q"].dim() == 3}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, packed: bool, **how: Any) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        **how,
    ).transpose(1, 2)
    return out[0] if packed else out


def _causal(**inputs: Any) -> Tensor:
    return _sdpa(**inputs, is_causal=True)


def _by_backend(backend: SDPBackend, **inputs: Any) -> Tensor:
    with sdpa_kernel(backend):
        return _causal(**inputs)


def _dense_only(case: Case) -> str | None:
    special = {"W": "window", "S": "documents", "left": "window", "TK": "causal rows at the end"}
    missing = [name for key, name in special.items() if key in case.sizes]
    return f"it has no {' and no '.join(missing)}" if missing else None


def _gpu_and_dense(case: Case) -> str | None:
    return on_gpu(case) or _dense_only(case)


def _with_mask(inputs: Inputs) -> Inputs:
    """The mask is made once, untimed: kinder to the peer than a step of training is."""
    q = inputs["q"]
    borders, key_borders = inputs.get("cu_seqlens"), inputs.get("cu_seqlens_k")
    lengths = q.shape[-3], inputs["k"].shape[-3]
    rows, keys = (torch.arange(length, device=q.device) for length in lengths)
    both = borders_of(borders, key_borders, *lengths, q.device)
    seen = seen_mask(rows, keys, inputs.get("causal", True), inputs["window"], *both)
    return _heads_first(inputs) | {"attn_mask": seen}


def _masked(case: Case) -> str | None:
    if not {"W", "S", "left", "TK"} & set(case.sizes):
        return "is_causal serves dense calls"
    if case["T"] > DENSE_ROWS:
        return f"a mask of {case['T']} squared does not fit"
    return None


def _with_lengths(inputs: Inputs) -> Inputs:
    own = {name: inputs[name] for name in ("q", "k", "v", "scale")}
    return own | {"lengths": lengths_of(inputs["cu_seqlens"])}


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, lengths: list[int]
) -> Tensor:
    parts = [
        _sdpa(a[None], b[None], c[None], scale, True, is_causal=True)
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        if a.shape[0]
    ]
    return torch.cat(parts)


def _documents_without_window(case: Case) -> str | None:
    if "S" not in case.sizes:
        return "a dense batch is one call already"
    return "it has no window" if "W" in case.sizes else own_keys(case)


def _flex_reason(case: Case) -> str | None:
    return own_keys(case) or on_gpu(case)


def _made_block_mask(seen: Callable[..., Tensor], length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Eager, it forms the mask of all scores on its way.
    make = torch.compile(create_block_mask) if length > DENSE_ROWS else create_block_mask
    return make(seen, None, None, length, length, device=str(device))


def _block_mask(inputs: Inputs) -> Any:
    q, window, borders = inputs["q"], inputs["window"], inputs.get("cu_seqlens")
    length = q.shape[-3]
    rows = torch.arange(length, device=q.device)
    document = torch.zeros_like(rows)
    if borders is not None:
        document = torch.searchsorted(borders.long(), rows, right=True)
    reach = length if window is None else window

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        near = (row >= key) & (row - key < reach)
        return near & (document[row] == document[key])

    return _made_block_mask(seen, length, q.device)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, packed: bool, block_mask: Any
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, scale=scale, block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    return out[0] if packed else out


def _flex_inputs(inputs: Inputs) -> Inputs:
    return _heads_first(inputs) | {"block_mask": _block_mask(inputs)}


def _flex_with_mask(**inputs: Any) -> Tensor:
    """A step whose documents are new: the mask is built in it."""
    return _flex(**_heads_first(inputs), block_mask=_block_mask(inputs))


_SDPA = Entry("SDPA", _causal, _heads_first, _dense_only)
_BACKENDS = tuple(
    Entry(f"SDPA {name}", partial(_by_backend, backend), _heads_first, _gpu_and_dense)
    for name, backend in (
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    )
)


# patch_attention


def _folded_rows(inputs: Inputs) -> Inputs:
    """Where each slot of each patch lies; slots that no byte fills repeat the first."""
    borders = inputs["cu_patchlens"].long()
    starts, lengths = borders[:-1], borders.diff()
    slots = torch.arange(int(lengths.max()), device=borders.device)
    valid = slots < lengths[:, None]
    rows = starts[:, None] + torch.where(valid, slots, 0)
    own = {name: inputs[name] for name in ("q", "k", "v", "causal", "scale")}
    return own | {"rows": rows.clamp(max=inputs["q"].shape[0] - 1), "valid": valid}


def _one_length(case: Case) -> str | None:
    return None if case["borders"] == "even" and case["T"] % case["P"] == 0 else "ragged patches"


def _short(case: Case) -> str | None:
    return None if case["T"] // case["P"] <= 64 else "its padding does not fit for long patches"


def _fold(x: Tensor, rows: Tensor, valid: Tensor, padded: bool) -> Tensor:
    """(P, H, L, K); patches of one length need no gather."""
    shape = (*rows.shape, *x.shape[1:])
    x = x.index_select(0, rows.flatten()).view(shape) if padded else x.view(shape)
    return x.transpose(1, 2)


def _hidden(valid: Tensor, causal: bool) -> Tensor:
    """(P, 1, L or 1, L) bool, True: seen."""
    seen = valid[:, None, None]
    length = valid.shape[1]
    return seen & seen.new_ones(length, length).tril() if causal else seen


def _unfold(out: Tensor, rows: Tensor, valid: Tensor, padded: bool, total: int) -> Tensor:
    flat = out.transpose(1, 2).flatten(0, 1)
    if not padded:
        return flat
    kept = valid.flatten()
    return flat.new_zeros(total, *flat.shape[1:]).index_copy(0, rows.flatten()[kept], flat[kept])


def _folded(
    attend: Callable[..., Tensor], padded: bool, q: Tensor, k: Tensor, v: Tensor,
    rows: Tensor, valid: Tensor, causal: bool, scale: float | None,
) -> Tensor:  # fmt: skip
    total = q.shape[0]
    q, k, v = (_fold(x, rows, valid, padded) for x in (q, k, v))
    seen = _hidden(valid, causal) if padded or causal else None
    return _unfold(attend(q, k, v, seen, scale), rows, valid, padded, total)


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
    q, borders = inputs["q"], inputs["cu_patchlens"]
    if inputs["causal"]:
        return _flex_inputs(inputs | {"window": None, "cu_seqlens": borders})
    total = q.shape[0]
    patch = torch.searchsorted(borders.long(), torch.arange(total, device=q.device), right=True)

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return patch[row] == patch[key]

    return _heads_first(inputs) | {"block_mask": _made_block_mask(seen, total, q.device)}


def _by_patch(
    q: Tensor, k: Tensor, v: Tensor, borders: list[int], causal: bool, scale: float | None
) -> Tensor:
    parts = [
        _sdpa(q[None, a:b], k[None, a:b], v[None, a:b], scale, True, is_causal=causal)
        for a, b in pairwise(borders)
        if b > a
    ]
    return torch.cat(parts)


def _with_borders(inputs: Inputs) -> Inputs:
    own = {name: inputs[name] for name in ("q", "k", "v", "causal", "scale")}
    return own | {"borders": inputs["cu_patchlens"].tolist()}


def _few_patches(case: Case) -> str | None:
    return None if case["P"] <= 64 else f"{case['P']} calls"


_EVEN_BMM = Entry(
    "batch fold, bmm", partial(_folded, _folded_bmm, False), _folded_rows, _one_length
)

PEERS: dict[str, tuple[Entry, ...]] = {
    "attention": (
        _SDPA,
        *_BACKENDS,
        Entry("SDPA, mask of all scores", _sdpa, _with_mask, _masked),
        BLOCKS,
        Entry("SDPA by document", _by_document, _with_lengths, _documents_without_window),
        Entry("FlexAttention", _flex, _flex_inputs, _flex_reason, compiled=True),
        Entry("FlexAttention and its mask", _flex_with_mask, dict, _flex_reason, compiled=True),
        VARLEN,
        FLA,
        compiled(_SDPA),
    ),
    "patch_attention": (
        _EVEN_BMM,
        Entry("batch fold, SDPA", partial(_folded, _folded_sdpa, False), _folded_rows, _one_length),
        Entry("padded fold, bmm", partial(_folded, _folded_bmm, True), _folded_rows, _short),
        Entry("padded fold, SDPA", partial(_folded, _folded_sdpa, True), _folded_rows, _short),
        Entry("SDPA by patch", _by_patch, _with_borders, _few_patches),
        PATCH_VARLEN,
        Entry("FlexAttention", _flex, _patch_block_mask, on_gpu, compiled=True),
        compiled(_EVEN_BMM),
    ),
}
