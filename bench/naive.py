"""The library's ops as one writes them at first in stock PyTorch, for a whole model at once.

Patches are padded to rectangles, embeddings of all bytes and all logits are in memory, masks are
dense. Each function computes what the op of its name does for what the models ask of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import stlm_kernels
from stlm_kernels import Patches
from stlm_models.attention import document_starts

from .blt_patches import by_search, patches_by_document

HASH_BASE = 1_000_000_007


def find_patches(byte_ids: Tensor, *, capacity: int | None = None, **options: object) -> Patches:
    if capacity is not None:
        raise ValueError(f"capacity: expected None in the naive composition, got {capacity}")
    options = {name: value for name, value in options.items() if value is not None}
    return Patches(*patches_by_document(by_search)(byte_ids, **options))


def byte_pool(byte_ids: Tensor, weight: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    return segment_pool(F.embedding(byte_ids.long(), weight), cu_patchlens, mode=mode)


def segment_pool(x: Tensor, cu_patchlens: Tensor, *, mode: str) -> Tensor:
    padded, inside = _padded(x, cu_patchlens)
    total = padded.sum(1)
    if mode == "sum":
        return total
    if mode != "mean":
        raise ValueError(f'mode: expected "mean" or "sum" in the naive composition, got {mode!r}')
    return total / inside.sum(1).clamp(min=1)[:, None]


def ngram_embedding(
    byte_ids: Tensor, tables: list[Tensor], *, ns: tuple[int, ...], cu_seqlens: Tensor
) -> Tensor:
    ids = byte_ids.long()
    places = torch.arange(len(ids)) - document_starts(cu_seqlens, len(ids))
    total = torch.zeros(len(ids), tables[0].shape[1])
    for n, table in zip(ns, tables, strict=True):
        value = torch.zeros_like(ids)
        for back in range(n):  # the newest byte has the highest power
            earlier = F.pad(ids, (back, 0))[: len(ids)].masked_fill(places < back, 0)
            value = value * HASH_BASE + earlier
        total = total + F.embedding(value.remainder(len(table)), table)
    return total


def unpool(
    patch_states: Tensor,
    read_ids: Tensor,
    *,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    null = patch_states.new_zeros(1, patch_states.shape[1]) if null_state is None else null_state
    rows = torch.cat([null.reshape(1, -1).to(patch_states.dtype), patch_states])[
        read_ids.long() + 1
    ]
    return rows if residual is None else rows + residual


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    if cu_seqlens is None:
        return _masked_attention(q, k, v, window)
    (q, inside), (k, _), (v, _) = (_padded(x, cu_seqlens) for x in (q, k, v))
    return _masked_attention(q, k, v, window)[inside]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(q.shape[-3]) if positions is None else positions
    cos, sin = (x[rows].repeat(1, 2)[:, None].to(q.dtype) for x in (cos, sin))

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q, q_weight), turned(k, k_weight)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int,
) -> Tensor:
    logits = logit_scale * F.linear(input, linear_weight)[..., :valid_vocab].float()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return F.cross_entropy(
        logits.flatten(0, -2), target.flatten().long(), reduction=reduction,
        ignore_index=ignore_index,
    )  # fmt: skip


def _padded(x: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Segments of x (T, ...) as a rectangle (n, longest, ...) with zeros, and where they are."""
    borders = cu_rows.long()
    lengths = borders.diff()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = x.new_zeros(*inside.shape, *x.shape[1:])
    padded[inside] = x[: int(borders[-1])]
    return padded, inside


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """(B, T, H, K) under a dense (T, T) mask, key heads repeated."""
    places = torch.arange(q.shape[1])
    back = places[:, None] - places
    mask = (back >= 0) & (back < (q.shape[1] if window is None else window))
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


OPS: dict[str, Callable[..., object]] = {
    f.__name__: f
    for f in (
        find_patches,
        byte_pool,
        segment_pool,
        ngram_embedding,
        unpool,
        attention,
        qk_norm_rope,
        linear_cross_entropy,
    )
}


@contextmanager
def naive_ops() -> Iterator[None]:
    """Within it the modules of `stlm_models` call these functions in place of the library's."""
    ours = {getattr(stlm_kernels, name): function for name, function in OPS.items()}
    with ExitStack() as stack:
        for module_name, module in list(sys.modules.items()):
            if not module_name.startswith("stlm_models"):
                continue
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in ours:
                    stack.enter_context(mock.patch.object(module, name, ours[value]))
        yield
