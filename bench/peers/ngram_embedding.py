"""Peers of ngram_embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Inputs

from .entry import Entry, compiled

DEFAULT_MULTIPLIER = 1_000_000_007


def _with_positions(inputs: Inputs) -> Inputs:
    """Give int64 ids of documents, the position of each in its own, and the bytes outside."""
    ids = inputs["byte_ids"].long()
    boundaries = inputs.get("cu_seqlens", torch.tensor([0, ids.shape[0]])).to(ids)
    starts = torch.repeat_interleave(boundaries[:-1], boundaries.diff())
    last = starts.shape[0]
    kept = {name: x for name, x in inputs.items() if name != "cu_seqlens"}
    return kept | {
        "byte_ids": ids[:last],
        "positions": torch.arange(last, device=ids.device) - starts,
        "outside": ids.shape[0] - last,
    }


def _sum_of_embeddings(
    byte_ids: Tensor,
    ngram_sizes: tuple[int, ...],
    positions: Tensor,
    outside: int,
    multipliers: tuple[int, ...] | None = None,
    **tables: Any,
) -> Tensor:
    shifted = [byte_ids] + [
        F.pad(byte_ids, (back, 0))[:-back].masked_fill(positions < back, 0)
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
    return F.pad(out, (0, 0, 0, outside)) if outside else out


_EMBEDDINGS = Entry("shifts + F.embedding", _sum_of_embeddings, _with_positions)

PEERS: dict[str, tuple[Entry, ...]] = {"ngram_embedding": (_EMBEDDINGS, compiled(_EMBEDDINGS))}
