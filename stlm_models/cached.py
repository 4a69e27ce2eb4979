"""A run of an `STLM` over texts that grow byte by byte: each byte costs one row of each byte layer.

The core runs once for each patch that closes, on the rows where one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stlm_kernels import unpool

from .cache import CacheRows, KVCache
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
        config, batch = model.config, len(windows)
        device = model.embedding.weight.device
        self.model, self.device = model, device
        self._patches = PatchState(
            batch,
            config.patch_rule,
            patch_size=config.patch_size,
            max_patch_len=config.max_patch_len,
            device=device,
        )
        self._pools = [PoolState(batch, config.byte_dim, config.pooling, device=device)]
        self._ngrams: NgramState | None = None
        if model.ngrams is not None:
            self._ngrams = NgramState(batch, config.ngram_sizes, device=device)
            self._pools.append(PoolState(batch, config.ngram_dim, config.pooling, device=device))
        self._core = _core_of(model.core, batch)
        self._caches = new_caches(model.decoder, batch)
        self._reads, self.hidden = self._prefill(self._index(range(batch)), windows)
        """(B, D) each: the patch states that the next bytes read, and the states before the output
        projection.
        """

    @torch.no_grad()
    def restart(self, rows: Sequence[int], windows: Sequence[list[int]]) -> None:
        """Put these ids in place of all that these rows have seen; the others stay."""
        index = self._index(rows)
        self._reads[index], self.hidden[index] = self._prefill(index, windows)

    @torch.no_grad()
    def step(self, byte_ids: Tensor, rows: Sequence[int]) -> None:
        """Show one more id, of (B,), to each of these rows (ascending).

        A row that is left out must be restarted before it goes on.
        """
        model, index = self.model, self._index(rows)
        closed = self._patches.step(byte_ids)
        embedded = model.embedding.embed(byte_ids)
        states = [embedded]
        if model.ngrams is not None and self._ngrams is not None:
            states.append(model.ngrams.embed(self._ngrams.step(byte_ids)))
        pooled = [pool.step(x, closed) for pool, x in zip(self._pools, states, strict=True)]
        # How many rows these are is all that the host waits for.
        closing = index[closed[index]]
        if len(closing):
            inputs = model.core_inputs(*(x[closing] for x in pooled))
            self._reads[closing] = model.patch_states(self._core.append(closing, inputs), inputs)
        x = rms_norm(embedded[index]) + self._reads[index]
        self.hidden[index] = model.decode(x[:, None], None, _at(self._caches, index))[:, 0]

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)

    def _prefill(self, rows: Tensor, windows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """One packed run that leaves its state in these rows: their reads and hidden states."""
        model = self.model
        ids, borders = _packed(windows, self.device)
        patches = model.patcher(ids, borders)
        last = borders[1:].long() - 1
        self._patches.resume(rows, ids, borders, patches)
        open_bytes = self._patches.lengths[rows]
        pooled = model.pool(ids, patches, borders)
        for pool, x in zip(self._pools, pooled, strict=True):
            pool.resume(rows, x[patches.patch_ids[last]], open_bytes)
        if self._ngrams is not None:
            self._ngrams.resume(rows, ids, borders)
        inputs = model.core_inputs(*pooled)
        out = self._core.start(rows, inputs, patches.cu_seqlens, open_bytes > 0)
        patch_states = model.patch_states(out, inputs)
        x = model.byte_inputs(ids, patch_states, patches)
        hidden = model.decode(x, borders, _at(self._caches, rows))[last]
        null_state = model.unpooling.null_state
        return unpool(patch_states, patches.read_ids[last], null_state=null_state), hidden


class _Core(Protocol):
    """The core over the complete patches of each row, which are its memory."""

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        """The core over packed documents x (P, D), one for each row, in place of what it had.

        The last patch of a document is forgotten again where it is_open (S,).
        """

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        """One more complete patch in each row: x (R, D) -> (R, D)."""


def _core_of(core: nn.Module, batch: int) -> _Core:
    return (
        _SteppedCore(core, batch) if hasattr(core, "new_caches") else _RecomputedCore(core, batch)
    )


class _SteppedCore:
    """A core with caches, such as `PatchCore`: a patch costs one row of each of its layers."""

    def __init__(self, core: Any, batch: int) -> None:
        self.core, self.caches = core, core.new_caches(batch)

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        out = self.core(x, cu_seqlens, _at(self.caches, rows))
        for cache in self.caches:
            cache.lens[rows] -= is_open.int()
        return out

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.core(x[:, None], None, _at(self.caches, rows))[:, 0]


class _RecomputedCore:
    """A core of the user's own: run over all complete patches of a row when one is added."""

    def __init__(self, core: nn.Module, batch: int) -> None:
        self.core = core
        self.inputs: list[Tensor] = [torch.empty(0)] * batch
        """(patches, D) of each row."""

    def start(self, rows: Tensor, x: Tensor, cu_seqlens: Tensor, is_open: Tensor) -> Tensor:
        ends = (cu_seqlens[1:] - is_open.int()).tolist()
        for row, begin, end in zip(rows.tolist(), cu_seqlens.tolist(), ends, strict=False):
            self.inputs[row] = x[begin:end]
        return self.core(x, cu_seqlens)

    def append(self, rows: Tensor, x: Tensor) -> Tensor:
        texts = []
        for row, patch in zip(rows.tolist(), x, strict=True):
            self.inputs[row] = torch.cat((self.inputs[row], patch[None]))
            texts.append(self.inputs[row])
        lengths = torch.tensor([0, *map(len, texts)], device=x.device)
        cu_seqlens = lengths.cumsum(0).int()
        return self.core(torch.cat(texts), cu_seqlens)[cu_seqlens[1:].long() - 1]


def _at(caches: Sequence[KVCache], rows: Tensor) -> Sequence[KVCache | CacheRows]:
    """Caches of these rows, ascending; of all of them without a copy."""
    return [cache if len(rows) == len(cache.lens) else cache.at(rows) for cache in caches]


def _packed(windows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (T,) int16 and their borders (S+1,) int32."""
    ids = torch.tensor([i for window in windows for i in window], dtype=torch.int16, device=device)
    lengths = torch.tensor([0, *map(len, windows)], device=device)
    return ids, lengths.cumsum(0).int()
