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


class Epochs:
    """Barriers that each block of a batch has passed.

    Args:
        count: blocks.
    """

    def __init__(self, count: int) -> None:
        self.of_blocks = np.zeros(count, np.int32)
        self.changes = 0
        self.are_same = True

    def advance(self, blocks: Array | None) -> None:
        """The blocks of these flags are in their next epoch; None is all of them."""
        if blocks is None:
            self.of_blocks += 1
        elif blocks.any():
            self.of_blocks += blocks
            self.are_same = bool((self.of_blocks == self.of_blocks[0]).all())
        else:
            return
        self.changes += 1


class _Last:
    """When something last happened, in whichever block."""

    def __init__(self, epochs: Epochs) -> None:
        self.epochs, self.change, self.were_same = epochs, NEVER, True
        self.of_blocks = np.full_like(epochs.of_blocks, NEVER)

    def note(self) -> None:
        """It happens now."""
        epochs = self.epochs
        if self.change != epochs.changes:
            self.change, self.were_same = epochs.changes, epochs.are_same
            self.of_blocks[:] = epochs.of_blocks

    def is_now(self) -> bool:
        """Return whether a block is in the epoch that it was in then."""
        epochs = self.epochs
        if self.change == epochs.changes:
            return True
        if self.were_same and epochs.are_same:  # then all have passed a barrier since
            return False
        return bool(np.count_nonzero(self.of_blocks == epochs.of_blocks))


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
        epochs: of the blocks.
    """

    def __init__(self, size: int, owners: int, epochs: Epochs) -> None:
        self.grain, self.several = COARSEST, owners + 1
        self.stamps_of_an_epoch = owners + 2
        self.writers = Elements(np.zeros(size // COARSEST, np.int32))
        self.readers = Elements(np.zeros(size // COARSEST, np.int32))
        self.last_write, self.last_read = _Last(epochs), _Last(epochs)
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
        self.last_read.note()
        self._waiting += len(index)
        if self._waiting > MOST_READS:
            self._note_reads()
        if not self.last_write.is_now():
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
        if self.last_write.is_now():
            races = _some(self._meets(self.writers, index, begin, stamps))
        if self.last_read.is_now():
            self._note_reads()
            others = _some(self._meets(self.readers, index, begin, stamps))
            races = others if races is None else races if others is None else races | others
        else:
            self._forget_reads()
        self.last_write.note()
        self._put(self.writers, index, stamps)
        return races

    def set_writer(self, index: Ints, size: int, owners: Array, epochs: Array) -> None:
        """Note writes that no read can meet: they were asked for before."""
        self.last_write.note()
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
