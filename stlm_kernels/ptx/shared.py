"""Shared memory of a batch of blocks by byte, with the shadow state that the checks need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .faults import Reporter
from .memory import Ints, Owners, as_bytes, bytes_at, check_alignment, gather
from .proxy import ProxyOrder
from .registers import Array
from .threads import Threads

WARPGROUP_AS_ONE = -3
"""Owner of a read by four warps together: no write of the same epoch, by whichever warp, is before
it for all of them."""


class SharedMemory:
    """Shared memory of the blocks, one after the other.

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
        self.owners = Owners(total)
        self.order = ProxyOrder(batch, total) if has_products else None

    def places(self, offsets: Ints, threads: Array, size: int, report: Reporter) -> Ints:
        """Positions in `data` of accesses by these threads."""
        outside = (offsets < 0) | (offsets + size > self.size)
        report("outside", outside, f"{size} bytes beyond the {self.size} of shared memory")
        return np.where(outside, 0, offsets) + self.batch.block[threads] * self.pitch

    def read(
        self, offsets: Ints, width: int, count: int, threads: Array, report: Reporter
    ) -> list[Array]:
        """Words per thread."""
        check_alignment(offsets, width * count, report)
        first = self.places(offsets, threads, width * count, report)
        self.check_read(bytes_at(first, width * count), threads, report)
        return gather(self.data, first, width, count)

    def check_read(self, places: Ints, threads: Array, report: Reporter) -> None:
        """Faults of a read of each thread's row of places."""
        self._check_read(places, self.batch.warp[threads], threads, report)

    def check_product(self, places: Ints, threads: Array, report: Reporter) -> None:
        """Faults of a read by the warpgroups whose first threads these are."""
        self._check_read(places, np.full(len(threads), WARPGROUP_AS_ONE), threads, report)
        assert self.order is not None
        unseen = self.order.unseen(places, threads)
        report("proxy", unseen.any(1), "written without a fence.proxy.async since")

    def _check_read(self, places: Ints, owners: Array, threads: Array, report: Reporter) -> None:
        report(
            "async", self.pending[places].any(1), "an asynchronous copy to it was not waited for"
        )
        report("unwritten", ~self.written[places].all(1), "of shared memory")
        races = self.owners.read(
            places, np.broadcast_to(owners[:, None], places.shape), self._epochs(threads, places)
        )
        report("race", races.any(1), "another warp wrote it since the last barrier")

    def write(self, offsets: Ints, values: list[Array], threads: Array, report: Reporter) -> None:
        size = values[0].dtype.itemsize * len(values)
        check_alignment(offsets, size, report)
        first = self.places(offsets, threads, size, report)
        places = bytes_at(first, size)
        report("async", self.pending[places].any(1), "an asynchronous copy to it is on its way")
        self.put(places, as_bytes(values), threads, report)

    def put(self, places: Ints, new: NDArray[np.uint8], threads: Array, report: Reporter) -> None:
        """Write bytes of each thread."""
        races = self._note_write(places, threads, report)
        races &= self.data[places] != new
        self.data[places] = new
        lost = self.data[places] != new  # to another thread in this instruction
        own = self.owners.writer[places] == self.batch.warp[threads][:, None]
        races |= lost & ~own
        report("race", races.any(1), "another warp touches it since the last barrier")
        report("lanes", (lost & own).any(1), "another lane stores another value there")

    def begin_copy(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Places of asynchronous copies that these threads begin."""
        places = bytes_at(self.places(offsets, threads, size, report), size)
        report("async", self.pending[places].any(1), "two copies to the same bytes")
        races = self._note_write(places, threads, report)
        report("race", races.any(1), "another warp touches it since the last barrier")
        self.pending[places] = True
        return places

    def end_copy(self, places: Ints, data: NDArray[np.uint8], threads: Array) -> None:
        """Copies land: they count as written now, so other warps need a barrier after the wait."""
        self.data[places] = data
        self.pending[places] = False
        self.owners.writer[places] = self.batch.warp[threads][:, None]
        self.owners.written_at[places] = self._epochs(threads, places)
        if self.order is not None:
            self.order.write(places, threads)

    def _note_write(self, places: Ints, threads: Array, report: Reporter) -> Array:
        """Which bytes another warp touched since the last barrier."""
        owners = np.broadcast_to(self.batch.warp[threads][:, None], places.shape)
        races = self.owners.write(places, owners, self._epochs(threads, places))
        self.written[places] = True
        if self.order is not None:
            read = self.order.is_read_by_a_product(places)
            report("async", read.any(1), "a product that was not waited for reads it")
            self.order.write(places, threads)
        return races

    def _epochs(self, threads: Array, places: Ints) -> Array:
        epochs = self.batch.epoch[self.batch.block[threads]]
        return np.broadcast_to(epochs[:, None], places.shape)
