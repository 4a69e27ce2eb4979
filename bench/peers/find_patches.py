"""Peers of find_patches.

Document after document, as BLT's patcher does, and all at once, as H-Net numbers its chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled

MASKS = ("patch_start_mask", "patch_end_mask")


def by_comparison(starts: Tensor, positions: Tensor) -> Tensor:
    """Number bytes as BLT does: every patch against every byte of the document."""
    return (starts[:, None] <= positions[None]).sum(0) - 1


def by_search(starts: Tensor, positions: Tensor) -> Tensor:
    return torch.searchsorted(starts, positions, right=True) - 1


def patches_by_document(number: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Find patches document after document, as BLT's patcher does; long patches are split."""

    def find(byte_ids: Tensor, **options: Any) -> tuple[Tensor, ...]:
        boundaries = options.get("cu_seqlens")
        edges = [0, len(byte_ids)] if boundaries is None else boundaries.tolist()
        lengths, patch_ids, read_ids, documents = [], [], [], [0]
        for begin, end in pairwise(edges):
            found = _document_patches(byte_ids, begin, end, number, options)
            before = documents[-1]
            lengths.append(found[0])
            patch_ids.append(found[1] + before)
            read_ids.append(torch.where(found[2] < 0, -1, found[2] + before))
            documents.append(before + len(found[0]))
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
    """Return lengths, then patch and readable patch of each byte, numbered within the document."""
    positions = torch.arange(end - begin, device=byte_ids.device)
    masks = {name: mask[begin:end] for name, mask in options.items() if name in MASKS}
    is_end = patch_ends(byte_ids[begin:end], positions, options | masks)
    is_start = is_end.roll(1)
    if options.get("patch_start_mask") is not None:
        is_start = is_start | options["patch_start_mask"][begin:end]
    is_start[:1] = True
    starts = is_start.nonzero().flatten()
    lengths = F.pad(starts, (0, 1), value=end - begin).diff()
    limit = options.get("max_patch_len")
    if limit is not None:
        split = [min(limit, n - k) for n in lengths.tolist() for k in range(0, n, limit)]
        lengths = torch.tensor(split, device=byte_ids.device, dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
    patch_ids = number(starts, positions)
    if limit is not None:
        is_end = is_end | (positions - starts[patch_ids] + 1 == limit)
    return lengths, patch_ids, torch.where(is_end, patch_ids, patch_ids - 1)


def patch_ends(ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
    """Return which bytes end a patch, its length aside; positions are within the document."""
    if options.get("patch_start_mask") is not None:
        return torch.zeros_like(positions, dtype=torch.bool)
    if options.get("patch_end_mask") is not None:
        return options["patch_end_mask"]
    if options.get("patch_size") is not None:
        return (positions + 1) % options["patch_size"] == 0
    letter = ((ids | 32) >= 97) & ((ids | 32) <= 122)
    word = letter | ((ids >= 48) & (ids <= 57)) | ((ids >= 0x80) & (ids <= 0xBF))
    return ~word & ((positions == 0) | F.pad(word, (1, 0), value=True)[:-1])


# All documents at once


def _with_documents(inputs: Inputs) -> Inputs:
    """Give boundaries in int64, and only the bytes of documents."""
    boundaries = inputs.get("cu_seqlens")
    if boundaries is None:
        boundaries = torch.tensor([0, len(inputs["byte_ids"])])
    boundaries = boundaries.to(inputs["byte_ids"].device, torch.int64)
    end = int(boundaries[-1])
    kept = {
        name: x[:end] if name in ("byte_ids", "patch_start_mask", "patch_end_mask") else x
        for name, x in inputs.items()
    }
    return kept | {"cu_seqlens": boundaries, "total": len(inputs["byte_ids"])}


def _running_sums(
    byte_ids: Tensor, cu_seqlens: Tensor, total: int, **options: Any
) -> tuple[Tensor, ...]:
    """Number patches by a running sum of their starts; a running maximum splits long ones."""
    first = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=len(byte_ids))
    positions = torch.arange(len(first), device=byte_ids.device)
    is_end = patch_ends(byte_ids, positions - first, options)
    is_start = (positions == first) | F.pad(is_end, (1, 0))[:-1]
    if options.get("patch_start_mask") is not None:
        is_start = is_start | options["patch_start_mask"]
    limit = options.get("max_patch_len")
    if limit is not None:
        along = (positions - torch.where(is_start, positions, 0).cummax(0).values) % limit
        is_start, is_end = is_start | (along == 0), is_end | (along == limit - 1)
    counts = is_start.cumsum(0)
    patch_ids = counts - 1
    read_ids = torch.where(is_end, patch_ids, patch_ids - 1)
    read_ids = torch.where(read_ids < patch_ids[first], -1, read_ids)
    documents = F.pad(counts, (1, 0))[cu_seqlens]
    if (max_patches := options.get("max_patches")) is None:
        offsets = F.pad(is_start.nonzero().flatten(), (0, 1), value=len(first))
    else:
        offsets = first.new_full((max_patches + 1,), len(first))
        offsets = offsets.scatter_reduce(0, patch_ids, positions, "amin")
    tail = (0, total - len(first))
    patch_ids, read_ids = F.pad(patch_ids, tail, value=-1), F.pad(read_ids, tail, value=-1)
    results = (offsets, patch_ids, read_ids, documents[-1], documents)
    return tuple(result.int() for result in results)


def _not_compiled(case: Case) -> str | None:
    if "C" not in case.sizes:
        return "its result has a size that depends on values"
    return "compiling it takes longer than all the rest" if "bench_cpu" in case.tags else None


_RUNNING_SUMS = Entry("running sums (H-Net's way)", _running_sums, _with_documents)

PEERS: dict[str, tuple[Entry, ...]] = {
    "find_patches": (
        Entry("BLT's comparison", patches_by_document(by_comparison)),
        Entry("searchsorted by document", patches_by_document(by_search)),
        _RUNNING_SUMS,
        compiled(Entry(_RUNNING_SUMS.name, _running_sums, _with_documents, _not_compiled)),
    ),
}
