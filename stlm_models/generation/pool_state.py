"""The open patches of rows that grow: a running pool, or all their bytes where one needs them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .stages import ByteModel
from .state import IncrementalPooling


class CachedPool(Protocol):
    """Pooling of patches as in `STLM.pool`, byte by byte."""

    def step(
        self, embedded: Tensor, rows: Tensor, encoded: Tensor, closed: Tensor, closing: Tensor
    ) -> Tensor:
        """The next byte of each row -> the pooled patches of the rows that close one.

        Args:
            embedded: (B, D) embeddings.
            rows, encoded: which rows (R,) are shown a byte, and its states (R, D).
            closed, closing: (B,) bool, rows whose byte closes a patch; those of `rows` by index.
        """

    def resume(
        self, rows: Tensor, pooled: Tensor, encoded: Tensor, last: Tensor, lengths: Tensor
    ) -> None:
        """Rows (R,) go on where packed texts end: see `IncrementalPooling.resume`.

        Args:
            pooled: (R, D) of the patches at their ends.
            encoded, last: (T, D) states of the texts, and (R,) where the last of each is.
            lengths: (R,) bytes of the open patches.
        """


def pool_of(model: ByteModel, batch: int) -> CachedPool:
    """Bytes are kept for attention alone: attention pooling, or an encoder inside patches."""
    config = model.config
    whole = config.pooling == "attention" or (config.encoder == "patch" and config.encoder_layers)
    return OpenPatches(model, batch) if whole else RunningPool(model, batch)


class RunningPool:
    """One state a row."""

    def __init__(self, model: ByteModel, batch: int) -> None:
        config, device = model.config, model.embedding.weight.device
        self.plain = model.pooling is None
        self.state = IncrementalPooling(batch, config.byte_dim, config.pooling, device=device)

    def step(
        self, embedded: Tensor, rows: Tensor, encoded: Tensor, closed: Tensor, closing: Tensor
    ) -> Tensor:
        x = embedded
        if not self.plain:
            x = encoded.new_zeros(embedded.shape).index_copy_(0, rows, encoded)
        self.state.add(x)
        return self.state.take(closing, x.dtype) if len(closing) else x[:0]

    def resume(
        self, rows: Tensor, pooled: Tensor, encoded: Tensor, last: Tensor, lengths: Tensor
    ) -> None:
        self.state.resume(rows, pooled, lengths)


class OpenPatches:
    """The states of the bytes of each row's open patch."""

    def __init__(self, model: ByteModel, batch: int) -> None:
        weight = model.embedding.weight
        self.model = model
        self.states = torch.zeros(batch, 0, weight.shape[1], device=weight.device)
        """(B, C, D); C grows when a patch needs it."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)

    def step(
        self, embedded: Tensor, rows: Tensor, encoded: Tensor, closed: Tensor, closing: Tensor
    ) -> Tensor:
        self._reserve(int(self.lengths.max()) + 1, encoded)
        self.states[rows, self.lengths[rows]] = encoded
        self.lengths[rows] += 1
        lengths = self.lengths[closing]
        self.lengths = self.lengths.masked_fill(closed, 0)
        used = torch.arange(self.states.shape[1], device=lengths.device) < lengths[:, None]
        boundaries = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        return self.model.pool_states(self.states[closing][used], boundaries)

    def resume(
        self, rows: Tensor, pooled: Tensor, encoded: Tensor, last: Tensor, lengths: Tensor
    ) -> None:
        self._reserve(int(lengths.max()) if len(lengths) else 0, encoded)
        self.lengths[rows] = lengths.long()
        places = torch.arange(self.states.shape[1], device=last.device)
        from_end = (lengths.long()[:, None] - 1 - places).clamp(min=0)
        self.states[rows] = encoded[last[:, None] - from_end]

    def _reserve(self, length: int, like: Tensor) -> None:
        batch, held, dim = self.states.shape
        more = like.new_zeros(batch, max(length - held, 0), dim)
        self.states = torch.cat((self.states.to(like.dtype), more), 1)
