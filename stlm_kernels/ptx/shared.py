"""Shared memory of a batch of blocks by byte, with the shadow state that the checks need."""

from __future__ import annotations

import numpy as np

from .elements import Elements, Ints, Marks, as_rows
from .faults import Reporter
from .lanes import LANES
from .memory import check_alignment
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

    BYTES_OF_A_BYTE = 24
    """The byte, two flags, and at worst (accesses of a byte) stamps of writer, reader and proxy."""

    def __init__(self, batch: Threads, size: int, has_products: bool) -> None:
        self.batch = batch
        # Whole lines, so that what is aligned in a block is aligned here.
        self.pitch = -(-max(size, 1) // 1024) * 1024
        self.size = size
        total = self.pitch * len(batch.epoch)
        self.bases = batch.block * self.pitch
        self.data = np.zeros(total, np.uint8)
        self.elements = Elements(self.data)
        self.written = Marks(np.zeros(total, bool))
        self.pending = Marks(np.zeros(total, bool))  # an asynchronous copy will land there
        self.has_pending = False
        # A warpgroup's product is an owner of its own: no write of the same epoch, by whichever
        # warp, is before it for all four of them.
        self.warpgroup = batch.n_threads // LANES
        # So are atomics: in order among themselves, with nothing else before a barrier.
        self.atomics = self.warpgroup + 1
        self.touches = Touches(total, self.warpgroup + 2, batch.clock)
        self.order = ProxyOrder(batch, total) if has_products else None

    def index(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Return where accesses of `size` bytes by these threads lie."""
        bits = int(np.bitwise_or.reduce(offsets)) if len(offsets) else 0
        if bits & (size - 1):
            check_alignment(offsets, size, report)
        if len(offsets) and bits + size > self.size:
            outside = (offsets < 0) | (offsets + size > self.size)
            if np.count_nonzero(outside):
                report("outside", outside, f"{size} bytes beyond the {self.size} of shared memory")
                offsets = np.where(outside, 0, offsets)
        return (offsets + self.batch.of_threads(self.bases, threads)) >> (size.bit_length() - 1)

    def read(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Array:
        """An element of `size` bytes for each thread."""
        index = self.index(offsets, size, threads, report)
        self.check_read(index, size, threads, report)
        return self.elements.of(size).take(index)

    def check_read(self, index: Ints, size: int, threads: Array, report: Reporter) -> None:
        """Faults of a read by each thread."""
        owners = self.batch.of_threads(self.batch.warp, threads)
        self._check_read(index, size, owners, threads, report)

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
        self._check_pending(index, size, report, "an asynchronous copy to it was not waited for")
        if not self.written.all_marked(index, size):
            report("unwritten", ~self.written.marked(index, size), "of shared memory")
        races = self.touches.read(index, size, owners, self.batch.epochs(threads))
        if races is not None:
            report("race", races.any(1), "another warp wrote it since the last barrier")

    def _check_pending(self, index: Ints, size: int, report: Reporter, detail: str) -> None:
        if self.has_pending and not self.pending.none_marked(index, size):
            report("async", self.pending.any_marked(index, size), detail)

    def write(
        self, offsets: Ints, elements: Array, size: int, threads: Array, report: Reporter
    ) -> None:
        """Store an element of `size` bytes of each thread."""
        index = self.index(offsets, size, threads, report)
        self._check_pending(index, size, report, "an asynchronous copy to it is on its way")
        self.put(index, elements, size, threads, report)

    def put(
        self, index: Ints, elements: Array, size: int, threads: Array, report: Reporter
    ) -> None:
        """Write elements of each thread."""
        races = self._note_write(index, size, threads, report)
        if self.order is not None:
            self.order.write(index, size, threads)
        memory = self.elements.of(size)
        before = None if races is None else memory.take(index)
        memory[index] = elements
        if races is not None or memory.take(index).tobytes() != elements.tobytes():
            self._report_writes(index, races, before, elements, threads, report)

    def _report_writes(
        self,
        index: Ints,
        races: Array | None,
        before: Array | None,
        elements: Array,
        threads: Array,
        report: Reporter,
    ) -> None:
        """Faults of writes that meet others: those that leave or change what another wrote."""
        size = elements.itemsize
        parts = self.touches.parts(size)
        new = as_rows(elements, size)

        def by_part(differs: Array) -> Array:
            return np.asarray(differs.reshape(len(index), parts, -1).any(2))

        wrong = np.zeros((len(index), parts), bool)
        if races is not None and before is not None:
            wrong |= races & by_part(as_rows(before, size) != new)
        # To another thread of the instruction.
        lost = by_part(as_rows(self.elements.of(size).take(index), size) != new)
        own = self.touches.is_last_writer(index, size, self.batch.warp[threads])
        wrong |= lost & ~own
        report("race", wrong.any(1), "another warp touches it since the last barrier")
        report("lanes", (lost & own).any(1), "another lane stores another value there")

    def atomic(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Places of atomic accesses, which the caller carries out in turn."""
        index = self.index(offsets, size, threads, report)
        report("unwritten", ~self.written.marked(index, size), "of shared memory")
        owners = np.full(len(threads), self.atomics)
        races = self.touches.write(index, size, owners, self.batch.epochs(threads))
        if races is not None:
            report("race", races.any(1), "another access touches it since the last barrier")
        if self.order is not None:
            self.order.write(index, size, threads)
        return index * size

    def begin_copy(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Return where asynchronous copies lie that these threads begin."""
        index = self.index(offsets, size, threads, report)
        self._check_pending(index, size, report, "two copies to the same bytes")
        races = self._note_write(index, size, threads, report)
        if races is not None:
            report("race", races.any(1), "another warp touches it since the last barrier")
        self.pending.mark(index, size)
        self.has_pending = True
        return index

    def end_copy(self, index: Ints, elements: Array, threads: Array) -> None:
        """Copies land: they count as written now, so other warps need a barrier after the wait."""
        size = elements.itemsize
        self.elements.of(size)[index] = elements
        self.pending.mark(index, size, False)
        owners = self.batch.of_threads(self.batch.warp, threads)
        self.touches.set_writer(index, size, owners, self.batch.epochs(threads))
        if self.order is not None:
            self.order.write(index, size, threads)

    def _note_write(self, index: Ints, size: int, threads: Array, report: Reporter) -> Array | None:
        """Mark parts as written; return those that another warp touched since the last barrier."""
        owners = self.batch.of_threads(self.batch.warp, threads)
        races = self.touches.write(index, size, owners, self.batch.epochs(threads))
        self.written.mark(index, size)
        if self.order is not None and self.order.on_their_way:
            read = self.order.is_read_by_a_product(index, size, threads)
            report("async", read, "a product that was not waited for reads it")
        return races
