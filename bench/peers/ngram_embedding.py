"""Stock compositions of hashed n-gram embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Inputs

from .entry import Entry, compiled

DEFAULT_MULTIPLIER = 1_000_000_007


def _with_places(inputs: Inputs) -> Inputs:
    """int64 ids of the documents, the place of each in its own, and how many bytes have none."""
    ids = inputs["byte_ids"].long()
    borders = inputs.get("cu_seqlens", torch.tensor([0, ids.shape[0]])).to(ids)
    starts = torch.repeat_interleave(borders[:-1], borders.diff())
    last = starts.shape[0]
    others = {name: x for name, x in inputs.items() if name != "cu_seqlens"}
    return others | {
        "byte_ids": ids[:last],
        "places": torch.arange(last, device=ids.device) - starts,
        "homeless": ids.shape[0] - last,
    }


def _sum_of_embeddings(
    byte_ids: Tensor,
    ngram_sizes: tuple[int, ...],
    places: Tensor,
    homeless: int,
    multipliers: tuple[int, ...] | None = None,
    **tables: Any,
) -> Tensor:
    shifted = [byte_ids] + [
        F.pad(byte_ids, (back, 0))[:-back].masked_fill(places < back, 0)
        for back in range(1, max(ngram_sizes))
    ]
    rows = []
    multipliers = multipliers or (DEFAULT_MULTIPLIER,) * len(ngram_sizes)
    for i, (n, multiplier) in enumerate(zip(ngram_sizes, multipliers, strict=True)):
        table, value = tables[f"table{i}"], shifted[0]
        for earlier in shifted[1:n]:
            value = value * multiplier + earlier
        rows.append(F.embedding(value.remainder(table.shape[0]), table))
    out = rows[0]
    for row in rows[1:]:
        out = out + row
    return F.pad(out, (0, 0, 0, homeless)) if homeless else out


_EMBEDDINGS = Entry("shifts + F.embedding", _sum_of_embeddings, _with_places)

PEERS: dict[str, tuple[Entry, ...]] = {"ngram_embedding": (_EMBEDDINGS, compiled(_EMBEDDINGS))}
