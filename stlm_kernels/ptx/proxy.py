"""The order between the two ways to shared memory: that of threads and that of `wgmma`.

Stores and `cp.async` go by the generic proxy, `wgmma` reads by the asynchronous one. A write is
seen there if a `fence.proxy.async` stands on the way from it to the read: program order within a
thread, barriers between threads (PTX ISA, memory consistency model). A `wgmma` is followed by a
fence of its own once it was waited for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import Elements, Ints, element
from .matrix import UNIT
from .registers import Array
from .threads import Threads

WARPGROUP = 128
NEVER = -1


class _Fences:
    """The latest fence of each of some threads or blocks, and the latest of an earlier epoch."""

    def __init__(self, count: int) -> None:
        self.epoch, self.number = np.full(count, NEVER), np.zeros(count, np.int64)
        self.epoch_before, self.number_before = np.full(count, NEVER), np.zeros(count, np.int64)

    def note(self, owners: Array, epochs: Array, number: int) -> None:
        older = owners[self.epoch[owners] < epochs]
        self.epoch_before[older], self.number_before[older] = self.epoch[older], self.number[older]
        self.epoch[owners], self.number[owners] = epochs, number

    def before(self, owners: Array, epochs: Array) -> tuple[Array, Array]:
        """Epoch and number of the latest fence that a barrier has followed."""
        earlier = self.epoch[owners] < epochs
        return (
            np.where(earlier, self.epoch[owners], self.epoch_before[owners]),
            np.where(earlier, self.number[owners], self.number_before[owners]),
        )


class ProxyOrder:
    """Writes, fences and products of a batch of blocks, in the order in which they happened.

    Args:
        batch: the threads.
        total: bytes of shared memory of all blocks.
    """

    def __init__(self, batch: Threads, total: int) -> None:
        self.batch = batch
        # Of each part: the thread in the batch that wrote it, its epoch then, and the fences of
        # all threads before.
        self.grain = UNIT
        self.writes = np.zeros((total // UNIT, 3), np.int32)
        self.writes[:, 1] = NEVER
        self._elements = Elements(self.writes)
        self.count = 0
        self._known: tuple[Any, Any, Any, Any] = None, None, None, None
        self.of_threads, self.of_blocks = _Fences(batch.n), _Fences(len(batch.epoch))
        self.read_by = np.zeros(total // UNIT, np.int32)  # number of the last product that reads it
        self.on_their_way: dict[int, Array] = {}
        """Products by number, and the blocks of which a warp has not waited for them."""

    def write(self, index: Ints, size: int, threads: Array) -> None:
        """Note writes: those of an asynchronous copy once it was waited for."""
        if size < self.grain:
            self.writes = self.writes.repeat(self.grain // size, 0)
            self.grain, self._elements = size, Elements(self.writes)
        elements = self._elements.of(12 * (size // self.grain))
        elements[index] = self._notes(threads, self.batch.epochs(threads), size)

    def _notes(self, threads: Array, epochs: Array, size: int) -> Array:
        """What is noted of writes now; kept, since many of the same threads follow each other."""
        known = self._known
        now = size, self.grain, self.count
        if known[0] is not threads or known[1] is not epochs or known[2] != now:
            notes = np.empty((len(threads), size // self.grain, 3), np.int32)
            notes[..., 0] = threads[:, None]
            notes[..., 1] = epochs[:, None]
            notes[..., 2] = self.count
            kind = element(12 * notes.shape[1])
            self._known = (
                threads,
                epochs,
                (size, self.grain, self.count),
                notes.reshape(-1).view(kind),
            )
        return self._known[3]

    def fence(self, threads: Array) -> None:
        """Note that these threads execute fence.proxy.async."""
        self.count += 1
        blocks = self.batch.block[threads]
        self.of_threads.note(threads, self.batch.epoch[blocks], self.count)
        blocks = np.unique(blocks)
        self.of_blocks.note(blocks, self.batch.epoch[blocks], self.count)

    def unseen(self, index: Ints, size: int, first: Array) -> Array:
        """Find parts of reads that have no fence on their way to the warpgroups that read them.

        Args:
            index: (warpgroups, reads) of `size` bytes each.
            first: the first thread of each warpgroup.

        Returns:
            (warpgroups, parts of the reads).
        """
        block = self.batch.block[first]
        epochs = self.batch.epoch[block]

        parts = self._elements.of(12 * (size // self.grain)).take(index)
        notes = parts.view(np.int32).reshape(len(index), -1, 3)
        written_at = notes[..., 1]
        # A fence of any thread after the barrier that follows the write, before the last barrier.
        between = self.of_blocks.before(block, epochs)[0]
        seen = written_at < between[:, None]
        # A fence of the whole warpgroup since the last barrier.
        fences = self.of_threads.epoch.reshape(-1, WARPGROUP)[first // WARPGROUP]
        fenced = (fences == epochs[:, None]).all(1)
        seen |= fenced[:, None] & (written_at < epochs[:, None])
        if not seen.all():  # a fence of the writing thread, and a barrier
            when = np.broadcast_to(epochs[:, None], seen.shape)
            epoch, number = self.of_threads.before(notes[..., 0], when)
            seen |= (epoch == written_at) & (number > notes[..., 2])
        return ~seen

    def read(self, units: Ints, number: int) -> None:
        """Note that a product reads units, from now until it was waited for."""
        self.read_by[units] = number

    def is_read_by_a_product(self, index: Ints, size: int, threads: Array) -> Array:
        """Return which accesses meet bytes that a product on its way in their block reads."""
        readers = self.read_by[(index * size)[:, None] // UNIT + np.arange(-(-size // UNIT))]
        block, found = self.batch.of_threads(self.batch.block, threads), np.zeros(len(index), bool)
        for number, waiting in self.on_their_way.items():
            found |= (readers == number).any(1) & waiting[block]
        return found
