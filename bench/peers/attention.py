"""Peers of attention: SDPA and its backends, blocks of a window, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stlm_kernels.ops.attention.reference import boundaries_of, seen_mask
from stlm_kernels.spec import Case, Inputs

from .attention_varlen import FLA, VARLEN
from .entry import Entry, compiled, lengths_of
from .installed import on_gpu, own_keys

DENSE_TOKENS = 16_384
"""Tokens beyond which a mask of all scores, or the scores, do not fit in memory."""
NO_DOCUMENT, BEFORE_ALL = -1, -2


def heads_first(inputs: Inputs) -> Inputs:
    """Return batched operands, which SDPA gets as (B, H, T, K)."""
    operands = {name: inputs[name] for name in ("q", "k", "v")}
    if operands["q"].dim() == 3:
        operands = {name: x[None] for name, x in operands.items()}
    return {**operands, "scale": inputs["scale"], "packed": inputs["q"].dim() == 3}


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, packed: bool, **options: Any
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        **options,
    ).transpose(1, 2)
    return out[0] if packed else out


def _causal(**inputs: Any) -> Tensor:
    return sdpa(**inputs, is_causal=True)


def _by_backend(backend: SDPBackend, **inputs: Any) -> Tensor:
    with sdpa_kernel(backend):
        return _causal(**inputs)


def _dense_only(case: Case) -> str | None:
    special = {
        "W": "window",
        "S": "documents",
        "left": "window",
        "TK": "queries at the end of more keys",
    }
    missing = [name for key, name in special.items() if key in case.sizes]
    return f"it has no {' and no '.join(missing)}" if missing else None


def _gpu_and_dense(case: Case) -> str | None:
    return on_gpu(case) or _dense_only(case)


def _with_mask(inputs: Inputs) -> Inputs:
    """Make the mask once, untimed, which favours the peer."""
    q = inputs["q"]
    boundaries, key_boundaries = inputs.get("cu_seqlens"), inputs.get("cu_seqlens_k")
    lengths = q.shape[-3], inputs["k"].shape[-3]
    tokens, keys = (torch.arange(length, device=q.device) for length in lengths)
    both = boundaries_of(boundaries, key_boundaries, *lengths, q.device)
    seen = seen_mask(tokens, keys, inputs.get("causal", True), inputs["window"], *both)
    return heads_first(inputs) | {"attn_mask": seen}


def _masked(case: Case) -> str | None:
    if not {"W", "S", "left", "TK"} & set(case.sizes):
        return "is_causal serves dense calls"
    if case["T"] > DENSE_TOKENS:
        return f"a mask of {case['T']} squared does not fit"
    return None


def _with_lengths(inputs: Inputs) -> Inputs:
    own = {name: inputs[name] for name in ("q", "k", "v", "scale")}
    return own | {"lengths": lengths_of(inputs["cu_seqlens"])}


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, lengths: list[int]
) -> Tensor:
    parts = [
        sdpa(a[None], b[None], c[None], scale, True, is_causal=True)
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


def made_block_mask(seen: Callable[..., Tensor], length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Eager, it forms the mask of all scores on its way.
    make = torch.compile(create_block_mask) if length > DENSE_TOKENS else create_block_mask
    return make(seen, None, None, length, length, device=str(device))


def _block_mask(inputs: Inputs) -> Any:
    q, window, boundaries = inputs["q"], inputs["window"], inputs.get("cu_seqlens")
    length = q.shape[-3]
    tokens = torch.arange(length, device=q.device)
    document = torch.zeros_like(tokens)
    if boundaries is not None:
        document = torch.searchsorted(boundaries.long(), tokens, right=True)
    reach = length if window is None else window

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        near = (row >= key) & (row - key < reach)
        return near & (document[row] == document[key])

    return made_block_mask(seen, length, q.device)


def flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, packed: bool, block_mask: Any
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, scale=scale, block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    return out[0] if packed else out


def flex_inputs(inputs: Inputs) -> Inputs:
    return heads_first(inputs) | {"block_mask": _block_mask(inputs)}


def _flex_with_mask(**inputs: Any) -> Tensor:
    """Build the mask within the call, as a step with new documents must."""
    return flex(**heads_first(inputs), block_mask=_block_mask(inputs))


# Blocks of one window that see themselves and the one before


def _batched(inputs: Inputs) -> Inputs:
    """Return (B, T, H, K) operands, and the document of each token."""
    q = inputs["q"]
    operands = {name: inputs[name] if q.dim() == 4 else inputs[name][None] for name in "qkv"}
    boundaries = inputs.get("cu_seqlens")
    tokens = torch.arange(operands["q"].shape[1], device=q.device)
    documents = torch.zeros_like(tokens)
    if boundaries is not None:
        documents = torch.searchsorted(boundaries.long(), tokens, right=True)
    own = {"window": inputs["window"], "scale": inputs["scale"], "packed": q.dim() == 3}
    return operands | own | {"documents": documents}


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, packed: bool,
    documents: Tensor,
) -> Tensor:  # fmt: skip
    length, heads, width = q.shape[1:]
    blocks = -(-length // window)
    tail = (0, 0, 0, 0, 0, blocks * window - length)
    q, k, v = (F.pad(x, tail).unflatten(1, (blocks, window)).transpose(2, 3) for x in (q, k, v))
    k, v = (_with_previous(x).repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    factor = width**-0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-1, -2)  # (B, blocks, H, window, 2 window)
    # In place: the product does not keep its result for the backward pass.
    scores += _mask(window, documents, scores)
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(1, 2)[:, :length]
    return out[0] if packed else out


def _with_previous(x: Tensor) -> Tensor:
    """Put the block before (zeros at first) ahead of each: (B, blocks, H, W, K) to 2 W."""
    before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat((before, x), dim=3)


def _mask(window: int, documents: Tensor, scores: Tensor) -> Tensor:
    """Return 0 where a query may attend, else -inf: (blocks, 1, window, 2 window), like scores."""
    length, device = documents.shape[0], scores.device
    blocks = -(-length // window)
    # Padding tokens attend to each other, so that no softmax is over nothing and turns into NaN.
    documents = F.pad(documents, (0, blocks * window - length), value=NO_DOCUMENT)
    keys = F.pad(documents, (window, 0), value=BEFORE_ALL).unfold(0, 2 * window, window)
    same = documents.view(blocks, window, 1) == keys[:, None]
    offsets = torch.arange(2 * window, device=device) - torch.arange(window, device=device)[:, None]
    allowed = same & (offsets > 0) & (offsets <= window)
    return scores.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, None]


def _window_only(case: Case) -> str | None:
    return own_keys(case) if "W" in case.sizes else "it is for windows"


_SDPA = Entry("SDPA", _causal, heads_first, _dense_only)
_BACKENDS = tuple(
    Entry(f"SDPA {name}", partial(_by_backend, backend), heads_first, _gpu_and_dense)
    for name, backend in (
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    )
)
_BLOCKS = Entry("blocks of bmm", _windowed, _batched, _window_only)

PEERS: dict[str, tuple[Entry, ...]] = {
    "attention": (
        _SDPA,
        *_BACKENDS,
        Entry("SDPA, mask of all scores", sdpa, _with_mask, _masked),
        _BLOCKS,
        Entry("SDPA by document", _by_document, _with_lengths, _documents_without_window),
        Entry("FlexAttention", flex, flex_inputs, _flex_reason, compiled=True),
        Entry("FlexAttention and its mask", _flex_with_mask, dict, _flex_reason, compiled=True),
        VARLEN,
        FLA,
        compiled(_SDPA),
    ),
}
