"""Hashed byte n-grams: their rolling hashes and the pooling of their embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import Patches, byte_pool

from .attention import document_starts

HASH_BASE = 1_000_000_007


class NgramPooling(nn.Module):
    """Pooled embeddings of hashed byte n-grams, added to a patch's input.

    A table row stands for every n-gram with its hash; an n-gram never reaches across documents.
    Pooling comes before the projection, so that it runs on P rows instead of T.

    Args:
        sizes: the lengths n, one table each.
        buckets: rows M of a table.
        dim: width of a table.
        out_dim: width of the result.
    """

    def __init__(self, sizes: tuple[int, ...], buckets: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.tables = nn.ParameterList(torch.randn(buckets, dim) * dim**-0.5 for _ in sizes)
        self.projection = nn.Linear(dim, out_dim, bias=False)

    def forward(
        self, byte_ids: Tensor, patches: Patches, cu_seqlens: Tensor, *, mode: str = "mean"
    ) -> Tensor:
        """byte_ids (T,), cu_seqlens (S+1,) in bytes -> (P, out_dim)."""
        return self.projection(self.pool(byte_ids, patches, cu_seqlens, mode=mode))

    def pool(
        self, byte_ids: Tensor, patches: Patches, cu_seqlens: Tensor, *, mode: str = "mean"
    ) -> Tensor:
        """As `forward`, before the projection: (P, dim)."""
        pooled = [
            byte_pool(
                ngram_hashes(byte_ids, size, len(table), cu_seqlens),
                table,
                patches.cu_patchlens,
                mode=mode,
            )
            for size, table in zip(self.sizes, self.tables, strict=True)
        ]
        return torch.stack(pooled).sum(0) if len(pooled) > 1 else pooled[0]

    def embed(self, hashes: Tensor) -> Tensor:
        """The n-grams that end at single bytes: hashes (..., sizes) -> (..., dim)."""
        by_size = zip(hashes.unbind(-1), self.tables, strict=True)
        return torch.stack([F.embedding(rows, table) for rows, table in by_size]).sum(0)


def hash_factors(size: int) -> list[int]:
    """What the ids of an n-gram are multiplied by, oldest first: powers, wrapped as int64 wraps."""
    return [(HASH_BASE**j + 2**63) % 2**64 - 2**63 for j in range(size)]


def ngram_hashes(byte_ids: Tensor, size: int, buckets: int, cu_seqlens: Tensor) -> Tensor:
    """The rolling hash of the last `size` ids at each byte, (T,) int64 in [0, buckets).

    floor-mod by buckets of the int64-wrapped sum over j < size of id[t-size+1+j] * 1,000,000,007^j,
    ids before the document counting as 0.
    """
    length = byte_ids.shape[0]
    ids = byte_ids.long()
    offset_in_document = torch.arange(length, device=ids.device)
    offset_in_document = offset_in_document - document_starts(cu_seqlens, length)
    total = torch.zeros_like(ids)
    for j, factor in enumerate(hash_factors(size)):
        back = size - 1 - j
        earlier = F.pad(ids, (back, 0))[:length].masked_fill(offset_in_document < back, 0)
        total = total + earlier * factor
    return total.remainder(buckets)
