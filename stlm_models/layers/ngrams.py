"""Hashed byte n-grams: their embeddings, pooled by patch or of the newest byte alone."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stlm_kernels import Patches, ngram_embedding, runtime, segment_pool

from ..config import HASH_MULTIPLIERS
from .typed_call import typed_as


class NgramPooling(nn.Module):
    """Pooled embeddings of hashed byte n-grams, added to a patch's input.

    A table row stands for every n-gram with its hash; an n-gram never reaches across documents.
    Pooling comes before the projection, so that it runs on P rows instead of T.

    Args:
        sizes: the lengths n.
        buckets: rows M of a table.
        dim: width of a table.
        out_dim: width of the result.
        hashes: hash functions, 1 to 11, those of the first `HASH_MULTIPLIERS`. Each has a table for
            each size: all of the first function, then all of the second, as in BLT.

    Raises:
        ValueError: hashes out of range.

    >>> ids, cu_seqlens = torch.tensor([*b"bytes"]), torch.tensor([0, 5], dtype=torch.int32)
    >>> NgramPooling((2, 3), 1024, 16, 64).rows(ids, cu_seqlens).shape
    torch.Size([5, 16])
    """

    def __init__(
        self, sizes: tuple[int, ...], buckets: int, dim: int, out_dim: int, *, hashes: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= hashes <= len(HASH_MULTIPLIERS):
            raise ValueError(f"hashes: expected 1 to {len(HASH_MULTIPLIERS)}, got {hashes}")
        self.sizes = sizes
        self.multipliers = tuple(m for m in HASH_MULTIPLIERS[:hashes] for _ in sizes)
        self.tables = nn.ParameterList(
            torch.randn(buckets, dim) * dim**-0.5 for _ in self.multipliers
        )
        self.projection = nn.Linear(dim, out_dim, bias=False)

    def forward(
        self, byte_ids: Tensor, patches: Patches, cu_seqlens: Tensor, *, mode: str = "mean"
    ) -> Tensor:
        """byte_ids (T,), cu_seqlens (S+1,) in bytes -> (P, out_dim)."""
        return self.projection(self.pool(byte_ids, patches, cu_seqlens, mode=mode))

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def pool(
        self, byte_ids: Tensor, patches: Patches, cu_seqlens: Tensor, *, mode: str = "mean"
    ) -> Tensor:
        """Pool as `forward` does, before the projection: (P, dim)."""
        return segment_pool(self.rows(byte_ids, cu_seqlens), patches.cu_patchlens, mode=mode)

    def rows(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The n-grams that end at each byte, before pooling and projection: (T, dim)."""
        tables = list(self.tables)
        return ngram_embedding(
            byte_ids,
            tables,
            ngram_sizes=self.sizes * (len(tables) // len(self.sizes)),
            multipliers=self.multipliers,
            cu_seqlens=cu_seqlens,
        )

    def embed(self, last_ids: Tensor) -> Tensor:
        """The n-grams that end a text each.

        Args:
            last_ids: (B, n), n at least the longest of `sizes`, from `IncrementalNgrams`.

        Returns:
            (B, dim), before the projection.
        """
        batch, length = last_ids.shape
        if runtime.on_gpu(last_ids.device):
            boundaries = torch.arange(batch + 1, dtype=torch.int32, device=last_ids.device)
            return self.rows(last_ids.flatten(), boundaries * length)[length - 1 :: length]
        # The hashes of `ngram_embedding`, which would form those of all ids, by one product.
        hashes = last_ids @ powers(self.sizes, self.multipliers, length).to(last_ids.device)
        rows = hashes.remainder(self.tables[0].shape[0]).unbind(1)
        dtype = runtime.compute_dtype(self.tables[0])
        wide = torch.promote_types(dtype, torch.float32)
        found = [table.index_select(0, at) for table, at in zip(self.tables, rows, strict=True)]
        out = found[0].to(dtype).to(wide)
        for row in found[1:]:
            out += row.to(dtype)
        return out.to(dtype)


@functools.cache
def powers(sizes: tuple[int, ...], multipliers: tuple[int, ...], length: int) -> Tensor:
    """(length, tables) int64: what the hash of each table multiplies each of the last ids by."""
    columns = [
        [0] * (length - size) + [_wrapped(multiplier**power) for power in range(size)]
        for multiplier, size in zip(multipliers, itertools.cycle(sizes), strict=False)
    ]
    with torch.inference_mode(False):
        return torch.tensor(columns).t().contiguous()


def _wrapped(number: int) -> int:
    """A number as int64 arithmetic keeps it."""
    return (number + 2**63) % 2**64 - 2**63
