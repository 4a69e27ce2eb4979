"""ngram_embedding for judging the others: an fp64 reference that loops, and plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT = 1_000_000_007


def hash_by_formula(last_ids: Sequence[int], multiplier: int, rows: int) -> int:
    """The table row of an n-gram, in whole numbers without bounds that are wrapped at the end."""
    total = sum(byte * multiplier**j for j, byte in enumerate(last_ids))
    return ((total + 2**63) % 2**64 - 2**63) % rows


def reference(
    byte_ids: Tensor,  # (T,)
    tables: Sequence[Tensor],  # (M_i, D) fp64
    *,
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> Tensor:
    """(T, D) fp64, one hash after the other."""
    total, width = byte_ids.shape[0], tables[0].shape[1]
    boundaries = [0, total] if cu_seqlens is None else cu_seqlens.tolist()
    documents = [byte_ids[start:end].tolist() for start, end in pairwise(boundaries)]
    out = tables[0].new_zeros(boundaries[-1], width)
    multipliers = [DEFAULT] * len(tables) if multipliers is None else multipliers
    for table, n, multiplier in zip(tables, ngram_sizes, multipliers, strict=True):
        padded = [[0] * n + document for document in documents]
        rows = [
            hash_by_formula(ids[t + 1 : t + 1 + n], multiplier, len(table))
            for ids in padded
            for t in range(len(ids) - n)
        ]
        out = out + table[torch.tensor(rows, dtype=torch.long)]
    return torch.cat([out, out.new_zeros(total - boundaries[-1], width)])


def yardstick(
    byte_ids: Tensor,
    tables: Sequence[Tensor],
    *,
    ngram_sizes: Sequence[int],
    multipliers: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Careful composition of plain torch ops: float32 inside, the tables' dtype outside."""
    wide = torch.promote_types(tables[0].dtype, torch.float32)
    boundaries = [0, byte_ids.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    documents = [byte_ids[start:end].long() for start, end in pairwise(boundaries)]
    multipliers = [DEFAULT] * len(tables) if multipliers is None else multipliers
    out = torch.zeros((), dtype=wide, device=byte_ids.device)
    for table, n, multiplier in zip(tables, ngram_sizes, multipliers, strict=True):
        rows = torch.cat([_hashes(ids, n, multiplier, len(table)) for ids in documents])
        out = out + F.embedding(rows, table.to(wide))
    return F.pad(out, (0, 0, 0, byte_ids.shape[0] - boundaries[-1])).to(tables[0].dtype)


def _hashes(ids: Tensor, n: int, multiplier: int, rows: int) -> Tensor:
    """Shifted ids times the wrapped powers of the multiplier, the way BLT writes it."""
    padded = F.pad(ids, (n - 1, 0))
    powers = [(multiplier**j + 2**63) % 2**64 - 2**63 for j in range(n)]
    terms = [padded[j : j + ids.shape[0]] * power for j, power in enumerate(powers)]
    return torch.stack(terms).sum(0).remainder(rows)
