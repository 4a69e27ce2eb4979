"""Rows that grow on the host: a model's plain parts run by few calls of numpy and torch.

What is watched, replaced, quantised or in 16 bits, and everything on a GPU, runs as modules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.norms import host_rms_norm
from ..layers.pooling import ByteUnpooling
from .core_state import BlockCore
from .host_bytes import HostBytes, Rows, host_bytes
from .pool_state import RunningPool
from .rows import FlatRows, PatchedRows
from .stages import ByteModel
from .state import IncrementalPooling

SUMS = ("mean", "sum")


def rows_of(model: ByteModel, batch: int) -> FlatRows | PatchedRows:
    """Return the state of as many rows for this kind of model."""
    return HostFlatRows(model, batch) if model.is_flat else HostPatchedRows(model, batch)


class HostFlatRows(FlatRows):
    """`FlatRows`, on the host where the model's parts are plain."""

    host: HostBytes | None = None

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = super().start(rows, byte_ids, cu_seqlens)
        self.host = host_bytes(self.model, self.ngrams, self.followers)
        return out

    @np.errstate(all="ignore")  # as torch's are
    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        if self.host is None or not self.host.serves(byte_ids):
            return super().step(byte_ids, rows)
        *_, own = self.host.own_states(byte_ids, _places(rows, len(byte_ids)))
        return self.host.output_states(self.decoder.step(torch.from_numpy(own), rows))


class HostPatchedRows(PatchedRows):
    """`PatchedRows`, on the host where the model's parts are plain."""

    host: HostBytes | None = None

    def start(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = super().start(rows, byte_ids, cu_seqlens)
        is_simple = self._is_simple()
        self.host = host_bytes(self.model, self.ngrams, self.followers) if is_simple else None
        if self.host is not None:
            self._to_core = self.model.to_core.weight.t()
            self._from_core = self.model.from_core.weight.t()
        return out

    def _is_simple(self) -> bool:
        """Return whether sums are pooled, and bytes read the state of the last patch as it is."""
        return (
            self.model.head is None
            and type(self.model.unpooling) is ByteUnpooling
            and isinstance(self.pool, RunningPool)
            and self.pool.state.mode in SUMS
        )

    @np.errstate(all="ignore")  # as torch's are
    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        if self.host is None or not self.host.serves(byte_ids):
            return super().step(byte_ids, rows)
        assert self.reads is not None
        assert isinstance(self.pool, RunningPool)
        at = _places(rows, len(byte_ids))
        closed = self.patches.host_step(byte_ids.long().numpy())
        embedded, ngrams, own = self.host.own_states(byte_ids, at)
        encoded = self.encoder.step(torch.from_numpy(own), rows).numpy()
        _add(self.pool.state, embedded if self.pool.plain else encoded, at)
        if ngrams is not None:
            _add(self.ngram_pool, ngrams, at)
        reads = self.reads.numpy()
        closing = rows.numpy()[closed[at]]
        if len(closing):
            reads[closing] = self._read_next(closing, own.dtype)
        x = torch.from_numpy(encoded + reads[at])
        return self.host.output_states(self.decoder.step(x, rows))

    def _read_next(self, closing: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
        """Return what these rows (R,) read from now on, (R, D): states of the core."""
        assert isinstance(self.pool, RunningPool)
        model = self.model
        pooled = torch.from_numpy(_take(self.pool.state, closing, dtype))
        if model.ngrams is not None:
            ngrams = torch.from_numpy(_take(self.ngram_pool, closing, dtype))
            pooled.addmm_(ngrams, model.ngrams.projection.weight.t())
        inputs = _normed(torch.mm(pooled, self._to_core))
        outputs = self.core.append(torch.from_numpy(closing), inputs)
        states = (
            _normed(outputs) if type(self.core) is BlockCore else model.core_states(outputs, inputs)
        )
        return torch.mm(states, self._from_core).numpy()


def _places(rows: Tensor, batch: int) -> Rows:
    return slice(None) if len(rows) == batch else rows.numpy()


def _normed(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    host_rms_norm(x.numpy(), out.numpy())
    return out


def _add(pool: IncrementalPooling, x: NDArray[Any], rows: Rows) -> None:
    """`IncrementalPooling.add` of x (R, D) in these rows, where sums are kept."""
    pool.states.numpy()[rows] += x
    pool.counts.numpy()[rows] += 1


def _take(pool: IncrementalPooling, rows: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
    """`IncrementalPooling.take`, where sums are kept."""
    states, counts = pool.states.numpy(), pool.counts.numpy()
    pooled = states[rows] / counts[rows] if pool.mode == "mean" else states[rows]
    states[rows], counts[rows] = 0, 0
    return pooled.astype(dtype)
