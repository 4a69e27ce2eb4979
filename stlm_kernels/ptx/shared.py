"""Shared memory of a batch of blocks by byte, with the shadow state that the checks need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .faults import Reporter
from .lanes import LANES
from .memory import Ints, any_marked, check_alignment, gather, mark, marked, rows, scatter
from .proxy import ProxyOrder
from .registers import Array
from .threads import Threads
from .touches import Touches


class SharedMemory:
    """Shared memory of the blocks, one after the other.

    An access is the `index`-th of its size from the beginning.

    Args:
        batch: the threads that share it.
        size: bytes of each block.
        has_products: whether `wgmma` reads it: only then is the order of the two proxies followed.
    """

    def __init__(self, batch: Threads, size: int, has_products: bool) -> None:
        self.batch = batch
        # Whole lines, so that what is aligned in a block is aligned here.
        self.pitch = -(-max(size, 1) // 1024) * 1024
        self.size = size
        total = self.pitch * len(batch.epoch)
        self.data = np.zeros(total, np.uint8)
        self.written = np.zeros(total, bool)
        self.pending = np.zeros(total, bool)  # an asynchronous copy will land there
        # A warpgroup's product is an owner of its own: no write of the same epoch, by whichever
        # warp, is before it for all four of them.
        self.warpgroup = batch.n_threads // LANES
        # So are atomics: in order among themselves, with nothing else before a barrier.
        self.atomics = self.warpgroup + 1
        self.touches = Touches(total, self.warpgroup + 2)
        self.order = ProxyOrder(batch, total) if has_products else None

    def index(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Return where accesses of `size` bytes by these threads lie."""
        outside = (offsets < 0) | (offsets + size > self.size)
        if np.count_nonzero(outside):
            report("outside", outside, f"{size} bytes beyond the {self.size} of shared memory")
            offsets = np.where(outside, 0, offsets)
        return (offsets + self.batch.block[threads] * self.pitch) // size

    def read(
        self, offsets: Ints, width: int, count: int, threads: Array, report: Reporter
    ) -> list[Array]:
        """Words per thread."""
        size = width * count
        check_alignment(offsets, size, report)
        index = self.index(offsets, size, threads, report)
        self.check_read(index, size, threads, report)
        return gather(self.data, index * size, width, count)

    def check_read(self, index: Ints, size: int, threads: Array, report: Reporter) -> None:
        """Faults of a read by each thread."""
        self._check_read(index, size, self.batch.warp[threads], threads, report)

    def check_product(self, index: Ints, size: int, threads: Array, report: Reporter) -> None:
        """Faults of reads, (warpgroups, reads), by the warpgroups whose first threads these are."""
        assert self.order is not None
        each = np.repeat(threads, index.shape[1])
        owners = np.full(len(each), self.warpgroup)
        self._check_read(index.reshape(-1), size, owners, each, self.batch.reporter(each))
        unseen = self.order.unseen(index, size, threads)
        report("proxy", unseen.any(1), "written without a fence.proxy.async since")

    def _check_read(
        self, index: Ints, size: int, owners: Array, threads: Array, report: Reporter
    ) -> None:
        pending = any_marked(self.pending, index, size)
        report("async", pending, "an asynchronous copy to it was not waited for")
        report("unwritten", ~marked(self.written, index, size), "of shared memory")
        races = self.touches.read(index, size, owners, self._epochs(threads))
        if np.count_nonzero(races):
            report("race", races.any(1), "another warp wrote it since the last barrier")

    def write(self, offsets: Ints, values: list[Array], threads: Array, report: Reporter) -> None:
        size = values[0].dtype.itemsize * len(values)
        check_alignment(offsets, size, report)
        index = self.index(offsets, size, threads, report)
        pending = any_marked(self.pending, index, size)
        report("async", pending, "an asynchronous copy to it is on its way")
        self.put(index, values, threads, report)

    def put(self, index: Ints, values: list[Array], threads: Array, report: Reporter) -> None:
        """Write words of each thread."""
        width, count = values[0].dtype.itemsize, len(values)
        size = width * count
        races = self._note_write(index, size, threads, report)
        raced = bool(np.count_nonzero(races))
        before = rows(self.data, size)[index] if raced else None
        scatter(self.data, index * size, values)
        now = gather(self.data, index * size, width, count)
        lost = any(np.count_nonzero(a != b) for a, b in zip(now, values, strict=True))
        if raced or lost:
            new = np.stack(values, 1).view(np.uint8)
            self._report_writes(index, races, before, new, threads, report)

    def _report_writes(
        self,
        index: Ints,
        races: Array,
        before: Array | None,
        new: NDArray[np.uint8],
        threads: Array,
        report: Reporter,
    ) -> None:
        """Faults of writes that meet others: those that leave or change what another wrote."""
        count, parts = races.shape
        size = new.shape[1]

        def by_part(differs: Array) -> Array:
            return np.asarray(differs.reshape(count, parts, -1).any(2))

        wrong = np.zeros((count, parts), bool)
        if before is not None:
            wrong |= races & by_part(before != new)
        lost = by_part(rows(self.data, size)[index] != new)  # to another thread of the instruction
        own = self.touches.is_last_writer(index, size, self.batch.warp[threads])
        wrong |= lost & ~own
        report("race", wrong.any(1), "another warp touches it since the last barrier")
        report("lanes", (lost & own).any(1), "another lane stores another value there")

    def atomic(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Places of atomic accesses, which the caller carries out in turn."""
        check_alignment(offsets, size, report)
        index = self.index(offsets, size, threads, report)
        report("unwritten", ~marked(self.written, index, size), "of shared memory")
        owners = np.full(len(threads), self.atomics)
        races = self.touches.write(index, size, owners, self._epochs(threads))
        report("race", races.any(1), "another access touches it since the last barrier")
        if self.order is not None:
            self.order.write(index, size, threads)
        return index * size

    def begin_copy(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Return where asynchronous copies lie that these threads begin."""
        index = self.index(offsets, size, threads, report)
        report("async", any_marked(self.pending, index, size), "two copies to the same bytes")
        races = self._note_write(index, size, threads, report)
        if np.count_nonzero(races):
            report("race", races.any(1), "another warp touches it since the last barrier")
        mark(self.pending, index, size)
        return index

    def end_copy(self, index: Ints, data: NDArray[np.uint8], threads: Array) -> None:
        """Copies land: they count as written now, so other warps need a barrier after the wait."""
        size = data.shape[1]
        rows(self.data, size)[index] = data
        mark(self.pending, index, size, False)
        self.touches.set_writer(index, size, self.batch.warp[threads], self._epochs(threads))
        if self.order is not None:
            self.order.write(index, size, threads)

    def _note_write(self, index: Ints, size: int, threads: Array, report: Reporter) -> Array:
        """Mark parts as written; return those that another warp touched since the last barrier."""
        races = self.touches.write(index, size, self.batch.warp[threads], self._epochs(threads))
        mark(self.written, index, size)
        if self.order is not None:
            read = self.order.is_read_by_a_product(index, size)
            report("async", read, "a product that was not waited for reads it")
            self.order.write(index, size, threads)
        return races

    def _epochs(self, threads: Array) -> Array:
        return self.batch.epoch[self.batch.block[threads]]
