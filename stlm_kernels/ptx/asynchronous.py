"""Copies and products that complete later: what is on its way, and what a wait completes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lanes import LANES
from .registers import Array, Mask
from .shared import SharedMemory
from .threads import Threads


@dataclass
class _Copy:
    threads: Array
    index: Array  # of each thread's place in shared memory, in units of its size
    data: NDArray[np.uint8]
    group: Array  # of each thread, counted from its first

    def only(self, chosen: Array) -> _Copy:
        return _Copy(
            self.threads[chosen], self.index[chosen], self.data[chosen], self.group[chosen]
        )


class Copies:
    """`cp.async`: bytes read when issued, in shared memory once the issuing thread has waited."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self.batch, self.shared = threads, shared
        self.committed = np.zeros(threads.n, np.int64)
        self.on_the_way: list[_Copy] = []

    def issue(self, threads: Array, offsets: Array, data: NDArray[np.uint8]) -> None:
        """Begin copies of the rows of data to offsets of shared memory."""
        size, report = data.shape[1], self.batch.reporter(threads)
        index = self.shared.begin_copy(offsets, size, threads, report)
        group = self.committed[threads].copy()
        self.on_the_way.append(_Copy(threads, index, data, group))

    def commit(self, mask: Mask) -> None:
        self.committed[self.batch.active(mask)] += 1

    def wait(self, mask: Mask, newest: int) -> None:
        """Complete all but the `newest` groups of these threads."""
        waits = np.zeros(self.batch.n, bool)
        waits[self.batch.active(mask)] = True
        left = []
        for copy in self.on_the_way:
            done = waits[copy.threads] & (copy.group < self.committed[copy.threads] - newest)
            if done.any():
                landed = copy.only(done)
                self.shared.end_copy(landed.index, landed.data, landed.threads)
            if not done.all():
                left.append(copy.only(~done))
        self.on_the_way = left


@dataclass
class _Product:
    number: int
    group: Array  # of each warp, counted from its first
    waiting: Array  # warps that have not waited for it


class Products:
    """`wgmma`: sums that may not be touched, and operands that may not change, before a wait.

    Values are computed when issued; registers and bytes are marked until each warp of the product
    has waited for the group it belongs to.
    """

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self.batch, self.order = threads, shared.order
        self.on_their_way: list[_Product] = []
        self.pending: dict[int, _Product] = {}  # slot -> the last of them that sums into it
        self.committed = np.zeros(threads.n // LANES, np.int64)
        self.count = 0

    def issue(self, slots: list[int], operands: list[Array], size: int, mask: Mask) -> None:
        """Begin a product that sums into registers and reads operands, in units of `size` bytes."""
        assert self.order is not None
        self.count += 1
        product = _Product(self.count, self.committed.copy(), self._warps(mask))
        for slot in slots:
            self.pending[slot] = product
        for index in operands:
            self.order.read(index, size, product.number)
        self.on_their_way.append(product)
        self.order.on_their_way.append(product.number)

    def commit(self, mask: Mask) -> None:
        self.committed += self._warps(mask)

    def wait(self, mask: Mask, newest: int) -> None:
        """Complete all but the `newest` groups of these warps."""
        assert self.order is not None
        waits = self._warps(mask)
        for product in self.on_their_way:
            product.waiting &= ~(waits & (product.group < self.committed - newest))
        self.on_their_way = [x for x in self.on_their_way if x.waiting.any()]
        self.pending = {slot: x for slot, x in self.pending.items() if x.waiting.any()}
        self.order.on_their_way = [x.number for x in self.on_their_way]

    def check(self, reads: tuple[int, ...], writes: tuple[int, ...], mask: Mask) -> None:
        """Fault where an instruction touches a register of a product that was not waited for."""
        is_product = self.batch.current.parts[0] == "wgmma"
        slots = reads if is_product else (*reads, *writes)  # products may share their sums
        for slot in slots:
            product = self.pending.get(slot)
            if product is not None and (product.waiting & self._warps(mask)).any():
                self.batch.fault("async", None, "the product in its registers was not waited for")

    def _warps(self, mask: Mask) -> Array:
        """Return which warps have an active lane."""
        if mask is None:
            return np.ones(self.batch.n // LANES, bool)
        return np.asarray(mask.reshape(-1, LANES).any(1))
