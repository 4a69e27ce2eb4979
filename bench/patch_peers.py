"""Stock compositions of find_patches over all documents at once, as H-Net numbers its chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels._spec import Case, Inputs

from .blt_patches import by_comparison, by_search, closes, patches_by_document
from .entry import Entry, compiled


def _with_documents(inputs: Inputs) -> Inputs:
    """Borders in int64; bytes of no document are left out."""
    borders = inputs.get("cu_seqlens")
    if borders is None:
        borders = torch.tensor([0, len(inputs["byte_ids"])])
    borders = borders.to(inputs["byte_ids"].device, torch.int64)
    end = int(borders[-1])
    kept = {
        name: x[:end] if name in ("byte_ids", "patch_start_mask", "patch_end_mask") else x
        for name, x in inputs.items()
    }
    return kept | {"cu_seqlens": borders, "total": len(inputs["byte_ids"])}


def _running_sums(
    byte_ids: Tensor, cu_seqlens: Tensor, total: int, **options: Any
) -> tuple[Tensor, ...]:
    """Patches are numbered by a sum of their beginnings; a running maximum splits long ones."""
    first = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=len(byte_ids))
    places = torch.arange(len(first), device=byte_ids.device)
    closed = closes(byte_ids, places - first, options)
    begins = (places == first) | F.pad(closed, (1, 0))[:-1]
    if options.get("patch_start_mask") is not None:
        begins = begins | options["patch_start_mask"]
    limit = options.get("max_patch_len")
    if limit is not None:
        along = (places - torch.where(begins, places, 0).cummax(0).values) % limit
        begins, closed = begins | (along == 0), closed | (along == limit - 1)
    counts = begins.cumsum(0)
    patch_ids = counts - 1
    read_ids = torch.where(closed, patch_ids, patch_ids - 1)
    read_ids = torch.where(read_ids < patch_ids[first], -1, read_ids)
    documents = F.pad(counts, (1, 0))[cu_seqlens]
    if (max_patches := options.get("max_patches")) is None:
        offsets = F.pad(begins.nonzero().flatten(), (0, 1), value=len(first))
    else:
        offsets = first.new_full((max_patches + 1,), len(first))
        offsets = offsets.scatter_reduce(0, patch_ids, places, "amin")
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
