"""Copies and products that complete later: what is on its way, and what a wait completes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lanes import LANES
from .registers import Array, Mask
from .shared import SharedMemory
from .threads import Threads


@dataclass
class _Copy:
    threads: Array
    index: Array  # of each thread's place in shared memory, in units of its size
    elements: Array
    group: Array  # of each thread, counted from its first

    def only(self, chosen: Array) -> _Copy:
        return _Copy(
            self.threads[chosen], self.index[chosen], self.elements[chosen], self.group[chosen]
        )


class Copies:
    """`cp.async`: bytes read when issued, in shared memory once the issuing thread has waited."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self.batch, self.shared = threads, shared
        self.committed = np.zeros(threads.n, np.int64)
        self.on_the_way: list[_Copy] = []

    def issue(self, threads: Array, offsets: Array, elements: Array) -> None:
        """Begin copies of elements to offsets of shared memory."""
        size, report = elements.itemsize, self.batch.reporter(threads)
        index = self.shared.begin_copy(offsets, size, threads, report)
        self.on_the_way.append(_Copy(threads, index, elements, self.committed[threads]))

    def commit(self, mask: Mask) -> None:
        self.committed += 1 if mask is None else mask

    def wait(self, mask: Mask, newest: int) -> None:
        """Complete all but the `newest` groups of these threads."""
        left = []
        landed: dict[
            int, list[_Copy]
        ] = {}  # by size: of two to the same bytes, the later one stays
        for copy in self.on_the_way:
            done = copy.group < self.committed[copy.threads] - newest
            if mask is not None:
                done &= mask[copy.threads]
            count = np.count_nonzero(done)
            if count:
                of_its_size = landed.setdefault(copy.elements.itemsize, [])
                of_its_size.append(copy if count == len(done) else copy.only(done))
            if count < len(done):
                left.append(copy.only(~done) if count else copy)
        for copies in landed.values():
            self.shared.end_copy(
                np.concatenate([x.index for x in copies]),
                np.concatenate([x.elements for x in copies]),
                np.concatenate([x.threads for x in copies]),
            )
        self.on_the_way = left
        self.shared.has_pending = bool(left)


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

    def issue(self, slots: list[int], operands: list[Array], mask: Mask) -> None:
        """Begin a product that sums into registers and reads operands, which are units."""
        assert self.order is not None
        self.count += 1
        product = _Product(self.count, self.committed.copy(), self._warps(mask))
        for slot in slots:
            self.pending[slot] = product
        for index in operands:
            self.order.read(index, product.number)
        self.on_their_way.append(product)
        self.order.on_their_way[product.number] = self._blocks(product.waiting)

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
        self.order.on_their_way = {x.number: self._blocks(x.waiting) for x in self.on_their_way}

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

    def _blocks(self, warps: Array) -> Array:
        """Return which blocks have one of these warps."""
        found = np.zeros(len(self.batch.epoch), bool)
        found[self.batch.block[::LANES][warps]] = True
        return found
