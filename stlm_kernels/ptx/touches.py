"""Warps or blocks that wrote and read each part of a memory since a point in its program."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .elements import Elements, Ints

Array = NDArray[Any]
COARSEST = 4
"""Bytes that share a stamp: as many as the smallest access has, and no more than this."""
MOST_READS = 1 << 20
"""Reads that may wait to be noted."""
NEVER = -1


class Touches:
    """The last writer and reader of each part of a memory.

    Two accesses of one part by different owners in the same epoch, one of them a write, have no
    order. An owner and an epoch make one number, the stamp: 0 is no owner, and those of an epoch
    are larger than all of the epoch before. Untouched parts cost no memory.

    What can meet nothing is not looked up: reads are noted once a write comes in their epoch, and
    a write looks for earlier ones where there was one.

    Args:
        size: bytes, a multiple of what any access has.
        owners: how many there are.
        epochs: the epoch of each block: the array itself, in which barriers count.
    """

    def __init__(self, size: int, owners: int, epochs: NDArray[np.int32]) -> None:
        self.grain, self.several = COARSEST, owners + 1
        self.stamps_of_an_epoch = owners + 2
        self.writers = Elements(np.zeros(size // COARSEST, np.int32))
        self.readers = Elements(np.zeros(size // COARSEST, np.int32))
        self.epochs = epochs
        # The epoch of each block when something was last written or read, by whichever.
        self.written_at, self.read_at = np.full_like(epochs, NEVER), np.full_like(epochs, NEVER)
        self._reads: list[tuple[Ints, int, Array, Array | int]] = []
        self._waiting = 0
        # The last stamps: many accesses of the same threads follow each other.
        self._known: tuple[Any, Any, int, Any, Any] = None, None, 0, None, None

    def read(self, index: Ints, size: int, owners: Array, epochs: Array | int) -> Array | None:
        """Note reads of `size` bytes each, the `index`-th of that size.

        Returns:
            (accesses, parts): which of them race with a write; None where none does.
        """
        self._reads.append((index, size, owners, epochs))
        self.read_at[:] = self.epochs
        self._waiting += len(index)
        if self._waiting > MOST_READS:
            self._note_reads()
        if not self._is_now(self.written_at):
            return None
        begin, stamps = self._stamps(size, owners, epochs)
        return _some(self._meets(self.writers, index, begin, stamps))

    def write(self, index: Ints, size: int, owners: Array, epochs: Array | int) -> Array | None:
        """Note writes.

        Returns:
            (accesses, parts): which meet a read or write of another owner; None where none does.
        """
        begin, stamps = self._stamps(size, owners, epochs)
        races = None
        if self._is_now(self.written_at):
            races = _some(self._meets(self.writers, index, begin, stamps))
        if self._is_now(self.read_at):
            self._note_reads()
            others = _some(self._meets(self.readers, index, begin, stamps))
            races = others if races is None else races if others is None else races | others
        else:
            self._forget_reads()
        self.written_at[:] = self.epochs
        self._put(self.writers, index, stamps)
        return races

    def set_writer(self, index: Ints, size: int, owners: Array, epochs: Array) -> None:
        """Note writes that no read can meet: they were asked for before."""
        self.written_at[:] = self.epochs
        self._put(self.writers, index, self._stamps(size, owners, epochs)[1])

    def is_last_writer(self, index: Ints, size: int, owners: Array) -> Array:
        """Return which parts these owners wrote last: (accesses, parts)."""
        found = self._of(self.writers, index, self.parts(size))
        return np.asarray(found % self.stamps_of_an_epoch == owners[:, None] + 1)

    def parts(self, size: int) -> int:
        """Parts that an access has; smaller ones than all before make the parts smaller."""
        if size < self.grain:
            self._known = None, None, 0, None, None
            times, self.grain = self.grain // size, size
            self.writers = Elements(self.writers.data.repeat(times))
            self.readers = Elements(self.readers.data.repeat(times))
        return size // self.grain

    def _is_now(self, when: Array) -> bool:
        """Return whether a block is in the epoch that it was in then."""
        return bool(np.count_nonzero(when == self.epochs))

    def _note_reads(self) -> None:
        for index, size, owners, epochs in self._reads:
            begin, stamps = self._stamps(size, owners, epochs)
            shared = self._meets(self.readers, index, begin, stamps)
            # Owners that meet in one instruction: the last of them stands there.
            self._put(self.readers, index, stamps)
            shared |= self._of(self.readers, index, stamps.shape[1]) != stamps
            if np.count_nonzero(shared):
                several = np.broadcast_to(begin + np.int32(self.several), stamps.shape)
                access, part = np.nonzero(shared)
                self.readers.data[index[access] * stamps.shape[1] + part] = several[access, part]
        self._forget_reads()

    def _forget_reads(self) -> None:
        self._reads.clear()
        self._waiting = 0

    def _meets(self, table: Elements, index: Ints, begin: Array, stamps: Array) -> Array:
        """Return which parts bear the stamp of another owner of this epoch."""
        found = self._of(table, index, stamps.shape[1])
        return np.asarray((found > begin) & (found != stamps))

    def _stamps(self, size: int, owners: Array, epochs: Array | int) -> tuple[Array, Array]:
        """Stamp that those of the epochs exceed, (accesses or 1, 1), and the owners' for each part.

        The owners' are (accesses, parts).
        """
        known = self._known
        if known[0] is owners and known[1] is epochs and known[2] == size:
            return known[3], known[4]
        begin = np.asarray(epochs, np.int32).reshape(-1, 1) * np.int32(self.stamps_of_an_epoch)
        stamps = begin + (owners.astype(np.int32, copy=False).reshape(-1, 1) + np.int32(1))
        parts = self.parts(size)
        stamps = stamps.repeat(parts, 1) if parts > 1 else stamps
        self._known = owners, epochs, size, begin, stamps
        return begin, stamps

    def _of(self, table: Elements, index: Ints, parts: int) -> Array:
        return table.of(4 * parts).take(index).view(np.int32).reshape(-1, parts)

    def _put(self, table: Elements, index: Ints, stamps: Array) -> None:
        view = table.of(4 * stamps.shape[1])
        view[index] = np.ascontiguousarray(stamps).view(view.dtype).reshape(-1)


def _some(races: Array) -> Array | None:
    return races if np.count_nonzero(races) else None
