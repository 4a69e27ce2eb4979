"""find_patches as BLT's patcher does it in stock PyTorch: one document after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = ("patch_start_mask", "patch_end_mask")


def by_comparison(starts: Tensor, positions: Tensor) -> Tensor:
    """BLT's way: every patch against every byte of the document."""
    return (starts[:, None] <= positions[None]).sum(0) - 1


def by_search(starts: Tensor, positions: Tensor) -> Tensor:
    return torch.searchsorted(starts, positions, right=True) - 1


def patches_by_document(number: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Document after document, as BLT's patcher does: borders, lengths, long patches split."""

    def find(byte_ids: Tensor, **options: Any) -> tuple[Tensor, ...]:
        borders = options.get("cu_seqlens")
        edges = [0, len(byte_ids)] if borders is None else borders.tolist()
        lengths, patch_ids, read_ids, documents = [], [], [], [0]
        for begin, end in pairwise(edges):
            pieces = _document_patches(byte_ids, begin, end, number, options)
            before = documents[-1]
            lengths.append(pieces[0])
            patch_ids.append(pieces[1] + before)
            read_ids.append(torch.where(pieces[2] < 0, -1, pieces[2] + before))
            documents.append(before + len(pieces[0]))
        offsets = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
        unused = (options.get("max_patches") or documents[-1]) - documents[-1]
        tail = (0, len(byte_ids) - edges[-1])
        results = (
            F.pad(offsets, (0, unused), value=edges[-1]),
            F.pad(torch.cat(patch_ids), tail, value=-1),
            F.pad(torch.cat(read_ids), tail, value=-1),
            torch.tensor(documents[-1], device=byte_ids.device),
            torch.tensor(documents, device=byte_ids.device),
        )
        return tuple(result.int() for result in results)

    return find


def _document_patches(
    byte_ids: Tensor,
    begin: int,
    end: int,
    number: Callable[[Tensor, Tensor], Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths, patch and readable patch of each byte, numbered within the document."""
    positions = torch.arange(end - begin, device=byte_ids.device)
    masks = {name: mask[begin:end] for name, mask in options.items() if name in MASKS}
    closed = closes(byte_ids[begin:end], positions, options | masks)
    begins = closed.roll(1)
    if options.get("patch_start_mask") is not None:
        begins = begins | options["patch_start_mask"][begin:end]
    begins[:1] = True
    starts = begins.nonzero().flatten()
    lengths = F.pad(starts, (0, 1), value=end - begin).diff()
    limit = options.get("max_patch_len")
    if limit is not None:
        split = [min(limit, n - k) for n in lengths.tolist() for k in range(0, n, limit)]
        lengths = torch.tensor(split, device=byte_ids.device, dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
    patch_ids = number(starts, positions)
    if limit is not None:
        closed = closed | (positions - starts[patch_ids] + 1 == limit)
    return lengths, patch_ids, torch.where(closed, patch_ids, patch_ids - 1)


def closes(ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
    """Which bytes end a patch, its length apart; positions count from the document's start."""
    if options.get("patch_start_mask") is not None:
        return torch.zeros_like(positions, dtype=torch.bool)
    if options.get("patch_end_mask") is not None:
        return options["patch_end_mask"]
    if options.get("patch_size") is not None:
        return (positions + 1) % options["patch_size"] == 0
    letter = ((ids | 32) >= 97) & ((ids | 32) <= 122)
    word = letter | ((ids >= 48) & (ids <= 57)) | ((ids >= 0x80) & (ids <= 0xBF))
    return ~word & ((positions == 0) | F.pad(word, (1, 0), value=True)[:-1])
