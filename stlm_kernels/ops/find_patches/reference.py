"""The reference of find_patches: byte after byte, a running patch length and nothing else."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .op import Patches

_ALPHANUMERIC = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORD_BYTES = set(_ALPHANUMERIC) | set(range(0x80, 0xC0))


def reference(
    byte_ids: Tensor,  # (T,)
    *,
    rule: str | None = None,
    patch_start_mask: Tensor | None = None,  # (T,) bool
    patch_end_mask: Tensor | None = None,  # (T,) bool
    patch_size: int | None = None,
    max_patch_len: int | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,)
    max_patches: int | None = None,
) -> Patches:
    """Patches as lists of (begin, end), document by document, cut to max_patches at the end."""
    ids = byte_ids.tolist()
    boundaries = [0, len(ids)] if cu_seqlens is None else cu_seqlens.tolist()
    patch_ids, read_ids = [-1] * len(ids), [-1] * len(ids)
    patch_begins: list[int] = []
    patch_boundaries = [0]
    for begin, end in pairwise(boundaries):
        is_open, latest_complete = False, -1
        for t in range(begin, end):
            if not is_open or (patch_start_mask is not None and bool(patch_start_mask[t])):
                if is_open:
                    latest_complete = len(patch_begins) - 1
                patch_begins.append(t)
                is_open = True
            if rule == "space":
                ends = ids[t] not in _WORD_BYTES and (t == begin or ids[t - 1] in _WORD_BYTES)
            elif rule == "fixed":
                assert patch_size is not None
                ends = (t - begin + 1) % patch_size == 0
            else:
                ends = patch_end_mask is not None and bool(patch_end_mask[t])
            if ends or t - patch_begins[-1] + 1 == max_patch_len:
                is_open, latest_complete = False, len(patch_begins) - 1
            patch_ids[t], read_ids[t] = len(patch_begins) - 1, latest_complete
        patch_boundaries.append(len(patch_begins))
    offsets = [*patch_begins, boundaries[-1]]
    if max_patches is not None:
        offsets = [*offsets, *[boundaries[-1]] * max_patches][: max_patches + 1]
        for document, (begin, end) in enumerate(pairwise(boundaries)):
            last_slot = max_patches - 1 if patch_boundaries[document] < max_patches else -1
            for t in range(begin, end):
                patch_ids[t] = patch_ids[t] if patch_ids[t] < max_patches else -1
                read_ids[t] = min(read_ids[t], last_slot)
        patch_boundaries = [min(boundary, max_patches) for boundary in patch_boundaries]
    results = (offsets, patch_ids, read_ids, len(patch_begins), patch_boundaries)
    return Patches(*(torch.tensor(result, dtype=torch.int32) for result in results))
