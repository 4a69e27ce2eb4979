"""Embedding of bytes that followed earlier, each with how sure its source is of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .typed_call import typed_as


class FollowerEmbedding(nn.Module):
    """Sum over sources of a row for the id that each expects next, as sure as it is.

    The row of an id at a level of a source is `gains[source, level] * ids[id] +
    biases[source, level]`: what is learned of an id serves all sources and levels, which some of
    them would meet too seldom to learn each pair by itself. A source that expects nothing has a
    row of its own. All rows begin at zero.

    Args:
        sources: how many there are.
        levels: degrees of sureness of each.
        n_ids: ids that may follow.
        dim: width of a row.

    >>> followers = FollowerEmbedding(2, 8, 257, 16)
    >>> followers(torch.tensor([[0, 1 + 3 * 257 + 97]])).shape
    torch.Size([1, 16])
    """

    def __init__(self, sources: int, levels: int, n_ids: int, dim: int) -> None:
        super().__init__()
        self.ids = nn.Parameter(torch.randn(n_ids, dim))
        self.gains = nn.Parameter(torch.zeros(sources, levels, dim))
        self.biases = nn.Parameter(torch.zeros(sources, levels, dim))
        self.none = nn.Parameter(torch.zeros(sources, dim))

    def forward(self, indices: Tensor) -> Tensor:
        """indices (..., sources), 0 or 1 + level * n_ids + id -> (..., dim)."""
        flat = indices.flatten(0, -2)
        n_rows = self.gains.shape[0] * self.gains.shape[1] * len(self.ids)
        # All rows once, where there are fewer of them than of those to be summed.
        out = self.sums(flat, self.rows()) if flat.numel() > n_rows else self._of_each(flat)
        return out.unflatten(0, indices.shape[:-1])

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def rows(self) -> Tensor:
        """All rows (sources * (1 + levels * n_ids), dim), for a run without gradients."""
        sources, _, dim = self.gains.shape
        pairs = torch.addcmul(self.biases[:, :, None], self.gains[:, :, None], self.ids)
        return torch.cat((self.none[:, None], pairs.view(sources, -1, dim)), 1).flatten(0, 1)

    def sums(self, indices: Tensor, rows: Tensor) -> Tensor:
        """`forward` of indices (N, sources), by `rows`."""
        sources, levels, _ = self.gains.shape
        offsets = torch.arange(sources, device=indices.device) * (1 + levels * len(self.ids))
        return nn.functional.embedding_bag(indices + offsets, rows, mode="sum")

    def _of_each(self, indices: Tensor) -> Tensor:
        pair = (indices - 1).clamp(min=0)
        level, follower = pair // len(self.ids), pair % len(self.ids)
        source = torch.arange(len(self.gains), device=indices.device)
        rows = torch.addcmul(
            self.biases[source, level], self.gains[source, level], self.ids[follower]
        )
        return torch.where(indices[..., None] > 0, rows, self.none).sum(-2)
