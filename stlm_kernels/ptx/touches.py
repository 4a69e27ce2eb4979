"""Warps or blocks that wrote and read each part of a memory since a point in its program."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Array = NDArray[Any]
COARSEST = 4
"""Bytes that share a stamp: as many as the smallest access has, and no more than this."""


class Touches:
    """The last writer and reader of each part of a memory.

    Two accesses of one part by different owners in the same epoch, one of them a write, have no
    order. An owner and an epoch make one number, the stamp: 0 is no owner, and those of an epoch
    are larger than all of the epoch before. Untouched parts cost no memory.

    Args:
        size: bytes, a multiple of what any access has.
        owners: how many there are.
    """

    def __init__(self, size: int, owners: int) -> None:
        self.grain, self.several = COARSEST, owners + 1
        self.stamps_of_an_epoch = owners + 2
        self.writers = np.zeros(size // COARSEST, np.int32)
        self.readers = np.zeros(size // COARSEST, np.int32)

    def read(self, index: Ints, size: int, owners: Array, epochs: Array | int) -> Array:
        """Note reads of `size` bytes each, the `index`-th of that size.

        Returns:
            (accesses, parts): which of them race with a write.
        """
        begin, stamps = self._stamps(owners, epochs)
        writers, readers = self._rows(size)
        found = writers.take(index, 0)
        races = (found > begin) & (found != stamps)
        before = readers.take(index, 0)
        shared = (before > begin) & (before != stamps)
        # Owners that meet in one instruction: the last of them stands there.
        readers[index] = stamps
        shared |= readers.take(index, 0) != stamps
        if np.count_nonzero(shared):
            several = begin + np.int32(self.several)
            access, part = np.nonzero(shared)
            readers[index[access], part] = several if several.size == 1 else several[access, 0]
        return races

    def write(self, index: Ints, size: int, owners: Array, epochs: Array | int) -> Array:
        """Note writes; which of them meet a read or a write of another owner: (accesses, parts)."""
        begin, stamps = self._stamps(owners, epochs)
        writers, readers = self._rows(size)
        races = np.zeros((len(index), writers.shape[1]), bool)
        for table in (writers, readers):
            found = table.take(index, 0)
            races |= (found > begin) & (found != stamps)
        writers[index] = stamps
        return races

    def set_writer(self, index: Ints, size: int, owners: Array, epochs: Array) -> None:
        """Note writes that no read can meet: they were asked for before."""
        self._rows(size)[0][index] = self._stamps(owners, epochs)[1]

    def is_last_writer(self, index: Ints, size: int, owners: Array) -> Array:
        """Return which parts these owners wrote last: (accesses, parts)."""
        found = self._rows(size)[0].take(index, 0)
        return np.asarray(found % self.stamps_of_an_epoch == owners[:, None] + 1)

    def _stamps(self, owners: Array, epochs: Array | int) -> tuple[Array, Array]:
        """Stamp that those of the epochs exceed, and the owners' stamps: (accesses or 1, 1)."""
        begin = np.asarray(epochs, np.int32).reshape(-1, 1) * np.int32(self.stamps_of_an_epoch)
        return begin, begin + (owners.astype(np.int32).reshape(-1, 1) + np.int32(1))

    def _rows(self, size: int) -> tuple[Array, Array]:
        """Writers and readers as rows of the parts that an access of `size` bytes has."""
        if size < self.grain:
            times, self.grain = self.grain // size, size
            self.writers, self.readers = self.writers.repeat(times), self.readers.repeat(times)
        parts = size // self.grain
        return self.writers.reshape(-1, parts), self.readers.reshape(-1, parts)
