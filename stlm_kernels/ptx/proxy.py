"""The order between the two ways to shared memory: that of threads and that of `wgmma`.

Stores and `cp.async` go by the generic proxy, `wgmma` reads by the asynchronous one. A write is
seen there if a `fence.proxy.async` stands on the way from it to the read: program order within a
thread, barriers between threads (PTX ISA, memory consistency model). A `wgmma` is followed by a
fence of its own once it was waited for.
"""

from __future__ import annotations

import numpy as np

from .memory import Ints, rows
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
        self.writer = np.zeros(total, np.int32)  # thread in the batch
        self.written_at = np.full(total, NEVER, np.int32)  # epoch
        self.fences_before = np.zeros(total, np.int32)  # of all threads, when it was written
        self.count = 0
        self.of_threads, self.of_blocks = _Fences(batch.n), _Fences(len(batch.epoch))
        self.read_by = np.zeros(total, np.int32)  # number of the last product that reads it
        self.on_their_way: list[int] = []
        """Numbers of products that not all their warps have waited for."""

    def write(self, index: Ints, size: int, threads: Array) -> None:
        """Note writes: those of an asynchronous copy once it was waited for."""
        rows(self.writer, size)[index] = threads[:, None]
        epochs = self.batch.epoch[self.batch.block[threads]]
        rows(self.written_at, size)[index] = epochs[:, None]
        rows(self.fences_before, size)[index] = self.count

    def fence(self, threads: Array) -> None:
        """Note that these threads execute fence.proxy.async."""
        self.count += 1
        blocks = self.batch.block[threads]
        self.of_threads.note(threads, self.batch.epoch[blocks], self.count)
        blocks = np.unique(blocks)
        self.of_blocks.note(blocks, self.batch.epoch[blocks], self.count)

    def unseen(self, index: Ints, size: int, first: Array) -> Array:
        """Find bytes of reads that have no fence on their way to the warpgroups that read them.

        Args:
            index: (warpgroups, reads) of `size` bytes each.
            first: the first thread of each warpgroup.

        Returns:
            (warpgroups, bytes).
        """
        block = self.batch.block[first]
        epochs = self.batch.epoch[block]

        def of_bytes(table: Array) -> Array:
            return rows(table, size)[index].reshape(len(index), -1)

        written_at = of_bytes(self.written_at)
        # A fence of any thread after the barrier that follows the write, before the last barrier.
        between = self.of_blocks.before(block, epochs)[0]
        seen = written_at < between[:, None]
        # A fence of the whole warpgroup since the last barrier.
        fences = self.of_threads.epoch.reshape(-1, WARPGROUP)[first // WARPGROUP]
        fenced = (fences == epochs[:, None]).all(1)
        seen |= fenced[:, None] & (written_at < epochs[:, None])
        if not seen.all():  # a fence of the writing thread, and a barrier
            when = np.broadcast_to(epochs[:, None], seen.shape)
            epoch, number = self.of_threads.before(of_bytes(self.writer), when)
            seen |= (epoch == written_at) & (number > of_bytes(self.fences_before))
        return ~seen

    def read(self, index: Ints, size: int, number: int) -> None:
        """Note that a product reads bytes, from now until it was waited for."""
        rows(self.read_by, size)[index] = number

    def is_read_by_a_product(self, index: Ints, size: int) -> Array:
        """Return which accesses meet bytes that a product on its way reads."""
        if not self.on_their_way:
            return np.zeros(len(index), bool)
        readers = rows(self.read_by, size)[index]
        return np.asarray(np.isin(readers, self.on_their_way).any(1))
