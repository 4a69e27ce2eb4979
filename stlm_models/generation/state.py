"""Patching and pooling of a batch that grows byte by byte, with O(D) work a byte.

Each class holds where the rows of a batch stand. `step` takes the next byte of every row and gives
what the full run gives at that byte; `resume` takes over where a full run over packed texts, one a
row, has ended. Rows may differ in length. No step waits for the device or loops over rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stlm_kernels import Patches, find_patches, runtime

IDS = 257
"""256 bytes, and one id for all above, which no rule tells apart."""


class IncrementalPatcher:
    """Place of each row in its patch: the boundaries of `stlm_kernels.find_patches` by a rule.

    Args:
        batch: rows.
        rule, patch_size, max_patch_len: as in `stlm_kernels.find_patches`.
        device: where the state lies.

    >>> patcher = IncrementalPatcher(1, "space")
    >>> [patcher.step(torch.tensor([byte])).item() for byte in b"a b"]
    [False, True, False]
    """

    def __init__(
        self,
        batch: int,
        rule: str,
        *,
        patch_size: int | None = None,
        max_patch_len: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if max_patch_len is not None and max_patch_len < 1:
            raise ValueError(f"max_patch_len: expected None or at least 1, got {max_patch_len}")
        self.patch_size, self.max_patch_len = patch_size, max_patch_len
        # A document of one byte is a closed patch if the byte is one that closes patches.
        ids = torch.arange(IDS, dtype=torch.int16, device=device)
        documents = torch.arange(IDS + 1, dtype=torch.int32, device=device)
        alone = find_patches(ids, rule=rule, patch_size=patch_size, cu_seqlens=documents)
        self._closing = alone.read_ids >= 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        """(B,) bytes of the open patch."""
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        """(B,) bytes of the document so far (rule "fixed")."""
        self.after_closing = torch.zeros(batch, dtype=torch.bool, device=device)
        """(B,) the last byte of the document is one that closes patches (rule "space")."""

    def step(self, byte_ids: Tensor) -> Tensor:
        """The next byte of each row, (B,) integers -> (B,) bool: it closes its patch."""
        if runtime.values_visible(byte_ids):
            return torch.from_numpy(self.host_step(byte_ids.long().numpy()))
        ids = byte_ids.long().clamp(max=IDS - 1)
        return self._step(self._closing, ids, self.lengths, self.positions, self.after_closing)

    def host_step(self, byte_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`step` on the host, where numpy's calls for few numbers cost a third of torch's."""
        state = self._closing, self.lengths, self.positions, self.after_closing
        closing, *others = (each.numpy() for each in state)
        closed: NDArray[np.bool_] = self._step(closing, np.minimum(byte_ids, IDS - 1), *others)
        return closed

    def _step(
        self, closing: Any, ids: Any, lengths: Any, positions: Any, after_closing: Any
    ) -> Any:
        """`step` on arrays as on tensors, which it changes in place."""
        lengths += 1
        if self.patch_size is not None:
            positions += 1
            closed = positions % self.patch_size == 0
        else:
            closes = closing[ids]
            closed = closes > after_closing
            after_closing[:] = closes
        if self.max_patch_len is not None:
            closed = closed | (lengths == self.max_patch_len)
        lengths *= ~closed
        return closed

    def begin_documents(self, rows: Tensor) -> None:
        """The next byte of these rows, (B,) bool, begins a document; an open patch is dropped."""
        self.lengths.masked_fill_(rows, 0)
        self.positions.masked_fill_(rows, 0)
        self.after_closing.logical_and_(~rows)

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor, patches: Patches) -> None:
        """Row rows[s] goes on where document s of a full run has ended, none of them empty.

        Args:
            rows: (S,) int64.
            byte_ids, cu_seqlens, patches: packed texts (T,), their boundaries (S+1,), and what
                `find_patches` made of them.
        """
        last = cu_seqlens[1:].long() - 1
        patch = patches.patch_ids[last].long()
        open_bytes = cu_seqlens[1:] - patches.cu_patchlens[patch]
        self.lengths[rows] = open_bytes.masked_fill(patches.read_ids[last] == patch, 0)
        self.positions[rows] = cu_seqlens.diff()
        self.after_closing[rows] = self._closing[byte_ids[last].long().clamp(max=IDS - 1)]


class IncrementalPooling:
    """The pooled state of each row's open patch, as `byte_pool` and `segment_pool` define it.

    Sums are kept in float64 (float32 where a device has none), so that long patches lose nothing.

    Args:
        batch, dim: rows, and width D of a state.
        mode: "mean", "sum", "max", "min", "first" or "last".
        device: where the state lies.

    >>> pooling = IncrementalPooling(1, 1, "mean")
    >>> [pooling.step(torch.tensor([[x]]), torch.tensor([False])).item() for x in (2.0, 4.0)]
    [2.0, 3.0]
    """

    MODES = ("mean", "sum", "max", "min", "first", "last")

    def __init__(
        self, batch: int, dim: int, mode: str, *, device: torch.device | None = None
    ) -> None:
        if mode not in self.MODES:
            raise ValueError(f"mode: expected one of {self.MODES}, got {mode!r}")
        self.mode = mode
        self._nothing = {"max": -torch.inf, "min": torch.inf}.get(mode, 0.0)
        where = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.float32 if where.type == "mps" else torch.float64
        self.states = torch.full((batch, dim), self._nothing, dtype=dtype, device=where)
        """(B, D) the sum, maximum, minimum, first or last of the open patch."""
        self.counts = torch.zeros(batch, 1, dtype=torch.int32, device=where)
        """(B, 1) bytes of the open patch."""

    def step(
        self,
        x: Tensor,  # (B, D)
        closed: Tensor,  # (B,) bool
    ) -> Tensor:  # (B, D)
        """Add the state of each row's next byte.

        Returns:
            in x's dtype, each row's patch pooled up to and with this byte: what the full run gives
            where the byte closes it. The next byte of those rows begins a patch.
        """
        self.add(x)
        pooled = self._pooled(self.states, self.counts).to(x.dtype, copy=True)
        self.begin_documents(closed)
        return pooled

    def add(self, x: Tensor) -> None:
        """Add the states (B, D) of each row's next byte."""
        if self.mode in ("mean", "sum"):
            self.states += x
        elif self.mode in ("max", "min"):
            extreme = torch.maximum if self.mode == "max" else torch.minimum
            extreme(self.states, x.to(self.states.dtype), out=self.states)
        elif self.mode == "last":
            self.states.copy_(x)
        else:
            torch.where(self.counts == 0, x.to(self.states.dtype), self.states, out=self.states)
        self.counts += 1

    def take(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the pooled patches of these rows, (R,) int64, in a dtype; their next begin."""
        pooled = self._pooled(self.states[rows], self.counts[rows]).to(dtype)
        self.states.index_fill_(0, rows, self._nothing)
        self.counts.index_fill_(0, rows, 0)
        return pooled

    def _pooled(self, states: Tensor, counts: Tensor) -> Tensor:
        return states / counts if self.mode == "mean" else states

    def begin_documents(self, rows: Tensor) -> None:
        """The next byte of these rows, (B,) bool, begins a document; an open patch is dropped."""
        self.states.masked_fill_(rows[:, None], self._nothing)
        self.counts.masked_fill_(rows[:, None], 0)

    def resume(self, rows: Tensor, pooled: Tensor, lengths: Tensor) -> None:
        """Row rows[s] goes on within a patch of lengths[s] bytes that pooled[s] (D,) stands for.

        Args:
            rows: (S,) int64.
            pooled: (S, D) from the full run, where the trailing open patch is a patch.
            lengths: (S,) bytes of the open patch; 0 where none is open, and pooled is not read.
        """
        lengths = lengths[:, None]
        states = pooled.to(self.states.dtype)
        states = states * lengths if self.mode == "mean" else states
        self.states[rows] = torch.where(lengths > 0, states, self._nothing)
        self.counts[rows] = lengths.int()


class IncrementalNgrams:
    """The last ids of each row: all that an n-gram ending at its next byte depends on.

    Args:
        batch: rows.
        sizes: lengths of the n-grams, at least one.
        device: where the state lies.

    >>> ngrams = IncrementalNgrams(1, (2, 3))
    >>> [ngrams.step(torch.tensor([byte])).shape for byte in b"a"]
    [torch.Size([1, 3])]
    """

    def __init__(
        self, batch: int, sizes: tuple[int, ...], *, device: torch.device | None = None
    ) -> None:
        self.last_ids = torch.zeros(batch, max(sizes), dtype=torch.int64, device=device)
        """(B, n) the newest at the end; 0 before the document, as n-grams count it."""

    def step(self, byte_ids: Tensor) -> Tensor:
        """The next byte of each row, (B,) integers -> the last ids (B, n), itself included."""
        self.last_ids = torch.cat((self.last_ids[:, 1:], byte_ids.long()[:, None]), 1)
        return self.last_ids

    def begin_documents(self, rows: Tensor) -> None:
        """The next byte of these rows, (B,) bool, begins a document."""
        self.last_ids = self.last_ids.masked_fill(rows[:, None], 0)

    def resume(self, rows: Tensor, byte_ids: Tensor, cu_seqlens: Tensor) -> None:
        """Row rows[s] goes on where document s of packed byte_ids (T,) ends, none of them empty."""
        longest = self.last_ids.shape[1]
        back = torch.arange(-longest, 0, device=byte_ids.device)
        positions = cu_seqlens[1:, None] + back
        inside = positions >= cu_seqlens[:-1, None]
        ids = byte_ids.long()[positions.clamp(min=0)]
        self.last_ids[rows] = torch.where(inside, ids, 0)
