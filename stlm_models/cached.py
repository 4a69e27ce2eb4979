"""A run of an `STLM` over texts that grow byte by byte: each byte costs one row of each byte layer.

The core runs once for each patch that closes, on the rows where one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stlm_kernels import unpool

from .cached_core import cached_core, caches_at
from .incremental import NgramState, PatchState, PoolState
from .norms import rms_norm
from .transformer import new_caches

if TYPE_CHECKING:
    from .model import STLM


class CachedRun:
    """Rows of ids that grow, and what `model.hidden` gives at the last id of each.

    Args:
        model: an `STLM`.
        windows: the ids of each row, at least one in each; rows may differ in length.
    """

    @torch.no_grad()
    def __init__(self, model: STLM, windows: Sequence[list[int]]) -> None:
        self.model, self.device = model, model.embedding.weight.device
        batch = len(windows)
        self._rows: _Rows = FlatRows(model, batch) if model.is_flat else PatchedRows(model, batch)
        self.hidden = self._rows.start(self._index(range(batch)), *_packed(windows, self.device))
        """(B, D) the states before the output projection."""

    @torch.no_grad()
    def restart(self, rows: Sequence[int], windows: Sequence[list[int]]) -> None:
        """Put these ids in place of all that these rows have seen; the others stay."""
        index = self._index(rows)
        self.hidden[index] = self._rows.start(index, *_packed(windows, self.device))

    @torch.no_grad()
    def step(self, byte_ids: Tensor, rows: Sequence[int]) -> None:
        """Show one more id, of (B,), to each of these rows (ascending).

        A row that is left out must be restarted before it goes on.
        """
        index = self._index(rows)
        self.hidden[index] = self._rows.step(byte_ids, index)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)


class _Rows(Protocol):
    """What a kind of model remembers of each row."""

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One packed run, in place of what these rows (R,) had seen: their last states (R, D)."""

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        """Of ids (B,) the next of each of these rows (R,) -> their states (R, D)."""


class FlatRows:
    """A model without patches: the caches of its decoder, and the last ids for n-grams."""

    def __init__(self, model: STLM, batch: int) -> None:
        self.model, self.caches = model, new_caches(model.decoder, batch)
        self.ngrams = _ngram_state(model, batch)

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.ngrams is not None:
            self.ngrams.resume(rows, byte_ids, cu_seqlens)
        x = self.model.flat_inputs(byte_ids, cu_seqlens)
        out = self.model.decode(x, cu_seqlens, caches_at(self.caches, rows))
        return out[cu_seqlens[1:].long() - 1]

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        model, ngrams = self.model, None
        if model.ngrams is not None and self.ngrams is not None:
            ngrams = model.ngrams.embed(self.ngrams.step(byte_ids))[rows]
        x = model.position_inputs(model.embedding.embed(byte_ids[rows]), ngrams)
        return model.decode(x[:, None], None, caches_at(self.caches, rows))[:, 0]


class PatchedRows:
    """A model with patches: where each row stands in its patch, and which state it reads."""

    def __init__(self, model: STLM, batch: int) -> None:
        config, device = model.config, model.embedding.weight.device
        self.model = model
        self.patches = PatchState(
            batch,
            config.patch_rule,
            patch_size=config.patch_size,
            max_patch_len=config.max_patch_len,
            device=device,
        )
        self.pools = [PoolState(batch, config.byte_dim, config.pooling, device=device)]
        self.ngrams = _ngram_state(model, batch)
        if self.ngrams is not None:
            self.pools.append(PoolState(batch, config.ngram_dim, config.pooling, device=device))
        self.core = cached_core(model.core, batch)
        self.caches = new_caches(model.decoder, batch)
        self.reads: Tensor | None = None
        """(B, D) the patch states that the next bytes read."""

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        model = self.model
        assert self.reads is not None
        closed = self.patches.step(byte_ids)
        embedded = model.embedding.embed(byte_ids)
        states = [embedded]
        if model.ngrams is not None and self.ngrams is not None:
            states.append(model.ngrams.embed(self.ngrams.step(byte_ids)))
        pooled = [pool.step(x, closed) for pool, x in zip(self.pools, states, strict=True)]
        # How many rows these are is all that the host waits for.
        closing = rows[closed[rows]]
        if len(closing):
            inputs = model.core_inputs(*(x[closing] for x in pooled))
            self.reads[closing] = model.patch_states(self.core.append(closing, inputs), inputs)
        x = rms_norm(embedded[rows]) + self.reads[rows]
        return model.decode(x[:, None], None, caches_at(self.caches, rows))[:, 0]

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        model = self.model
        patches = model.patcher(byte_ids, cu_seqlens)
        last = cu_seqlens[1:].long() - 1
        self.patches.resume(rows, byte_ids, cu_seqlens, patches)
        open_bytes = self.patches.lengths[rows]
        pooled = model.pool(byte_ids, patches, cu_seqlens)
        for pool, x in zip(self.pools, pooled, strict=True):
            pool.resume(rows, x[patches.patch_ids[last]], open_bytes)
        if self.ngrams is not None:
            self.ngrams.resume(rows, byte_ids, cu_seqlens)
        inputs = model.core_inputs(*pooled)
        out = self.core.start(rows, inputs, patches.cu_seqlens, open_bytes > 0)
        patch_states = model.patch_states(out, inputs)
        null_state = model.unpooling.null_state
        reads = unpool(patch_states, patches.read_ids[last], null_state=null_state)
        if self.reads is None:
            self.reads = reads
        else:
            self.reads[rows] = reads
        x = model.byte_inputs(byte_ids, patch_states, patches)
        return model.decode(x, cu_seqlens, caches_at(self.caches, rows))[last]


def _ngram_state(model: STLM, batch: int) -> NgramState | None:
    if model.ngrams is None:
        return None
    return NgramState(batch, model.ngrams.sizes, device=model.embedding.weight.device)


def _packed(windows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (T,) int32 and their borders (S+1,) int32."""
    ids = torch.tensor([i for window in windows for i in window], dtype=torch.int32, device=device)
    lengths = torch.tensor([0, *map(len, windows)], device=device)
    return ids, lengths.cumsum(0).int()
