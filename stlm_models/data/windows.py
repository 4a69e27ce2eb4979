"""Training windows that a seed and a step number determine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import BOS_ID, IGNORED
from .loader import Batch, Patcher

Document = bytes | memoryview | NDArray[np.int32]
"""Real bytes, in memory or in a mapped file, or ids (N,) of a vocabulary."""


Recaller = Callable[[NDArray[np.int64], Tensor, Tensor], Tensor]
"""What followed earlier, (T, sizes), of ids with document boundaries at places (T,) of a stream."""


class DocumentStream:
    """The ids of all documents behind each other, id 256 before each, made when they are read.

    `stream[start:stop]` is int16, or int32 where documents are ids of a vocabulary.

    >>> stream = DocumentStream([b"ab", b"c"])
    >>> stream[0:5].tolist()
    [256, 97, 98, 256, 99]
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        lengths = np.fromiter((len(document) + 1 for document in documents), np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        dtypes = {document.dtype for document in documents if isinstance(document, np.ndarray)}
        self._dtype = np.result_type(np.int16, *dtypes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: slice) -> NDArray[np.integer]:
        start, stop, _ = index.indices(len(self))
        ids = np.full(stop - start, BOS_ID, self._dtype)
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        while self._starts[at] < stop:
            body, end = int(self._starts[at]) + 1, int(self._starts[at + 1])
            first, last = max(start, body), min(stop, end)
            if first < last:
                ids[first - start : last - start] = _ids(self._documents[at])[
                    first - body : last - body
                ]
            at += 1
        return ids

    def most_documents(self, length: int) -> int:
        """The most documents that any `length` ids in a row belong to, the first one cut or not."""
        # Behind a document's first id, as many may begin as in the densest chunk of the stream.
        starts = self._starts[:-1]
        begun = np.searchsorted(starts, starts + length - 1) - np.arange(len(starts))
        return 1 + int(begun.max())


def _ids(document: Document) -> NDArray[np.integer]:
    return document if isinstance(document, np.ndarray) else np.frombuffer(document, np.uint8)


class TrainingWindows:
    """Windows of `context` ids from documents, bytes or ids, that each start with id 256.

    Batch `step` of a seed is always the same, so a resumed run needs no state. An epoch shows every
    window once, in an order and at an offset of its own. With `max_patches`, batches
    have static shapes: behind their documents stand empty ones.

    Args:
        documents: at least one window's worth of ids.
        context: ids in a window.
        batch_size: windows in a batch, over all processes.
        seed: of the order and the offsets.
        patcher: finds the patches of each batch; None finds none.
        recall: finds what followed earlier in each batch, see `stlm_models.training.recall`.
        rank, world: this process reads its share of them, and all together what one would.

    Raises:
        ValueError: where the documents are shorter than a window, or batch_size cannot be shared
            evenly.

    >>> windows = TrainingWindows([b"two words" * 9], context=16, batch_size=2, seed=0)
    >>> windows.batch(0).byte_ids.shape
    torch.Size([32])
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        context: int,
        batch_size: int,
        seed: int,
        patcher: Patcher | None = None,
        recall: Recaller | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            expected = "at least 1" if world == 1 else f"a multiple of the {world} processes"
            raise ValueError(f"batch_size: expected {expected}, got {batch_size}")
        n_bytes = sum(map(len, documents))
        if n_bytes < context:
            raise ValueError(
                f"data: expected at least one window of {context} bytes to train on, got {n_bytes}"
            )
        self.ids = DocumentStream(documents)
        self.context, self.batch_size, self.seed, self.patcher = context, batch_size, seed, patcher
        self.recall = recall
        self.own_windows = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        # One id more than the window is its last target; the offset may use up to a window.
        self.n_windows = max(1, (len(self.ids) - 1) // context - 1)
        self._most_documents: int | None = None
        if getattr(patcher, "max_patches", None) is not None:
            self._most_documents = len(self.own_windows) * self.ids.most_documents(context)

    def batch(self, step: int) -> Batch:
        """Return this process's windows of a step; id 256 is no target, and begins a document."""
        starts = [self._start(step * self.batch_size + place) for place in self.own_windows]
        windows = np.stack([self.ids[start : start + self.context + 1] for start in starts])
        inputs, targets = windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1).astype(np.int64)
        targets[targets == BOS_ID] = IGNORED
        begins = inputs == BOS_ID
        begins[:: self.context] = True
        boundaries = np.append(np.flatnonzero(begins), len(inputs)).astype(np.int32)
        if self._most_documents is not None:
            empty = self._most_documents + 1 - len(boundaries)
            boundaries = np.pad(boundaries, (0, empty), constant_values=len(inputs))
        byte_ids, cu_seqlens = torch.from_numpy(inputs.copy()), torch.from_numpy(boundaries)
        patches = None if self.patcher is None else self.patcher(byte_ids, cu_seqlens)
        followers = None
        if self.recall is not None:
            places = (np.array(starts)[:, None] + np.arange(self.context)).reshape(-1)
            followers = self.recall(places, byte_ids, cu_seqlens)
        return Batch(byte_ids, torch.from_numpy(targets), cu_seqlens, patches, followers)

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, self.n_windows)
        offset, order = _epoch_order(self.seed, epoch, self.n_windows, self.context)
        # The last window must end within the stream, whatever the offset.
        return min(offset + int(order[position]) * self.context, len(self.ids) - self.context - 1)


@functools.lru_cache(maxsize=2)
def _epoch_order(
    seed: int, epoch: int, n_windows: int, context: int
) -> tuple[int, NDArray[np.int64]]:
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(context)), random.permutation(n_windows)
