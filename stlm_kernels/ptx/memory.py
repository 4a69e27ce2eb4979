"""Bytes and their shadows, and global memory.

An access is an array of addresses, one per active thread, of elements of as many bytes each. Global
addresses are those of the tensors themselves: results land where torch sees them.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .count import Costs
from .elements import Elements, Ints, Marks, as_rows, element
from .faults import Reporter
from .registers import Array
from .touches import Epochs, Touches

LINE = 128
"""Storages are seen from the line they begin in: no access crosses one."""
LAUNCH = 0
"""The one epoch of global memory: nothing orders the blocks of a launch."""

Shadow = NDArray[np.bool_]
"""Flags of the bytes of a storage's lines that something has written; see `new_shadow`."""
NO_SHADOWS: Mapping[int, Shadow] = {}


def bytes_at(offsets: Ints, size: int) -> Ints:
    """Every byte of accesses: (threads, size)."""
    return offsets[:, None] + np.arange(size)


class Allocation:
    """The bytes of one tensor's storage.

    Args:
        start, size: address and bytes.
        name: for messages.
        written: `new_shadow` of it; None where all of it was written before.
        owners: how many blocks the launch has.
    """

    def __init__(
        self, start: int, size: int, name: str, written: Shadow | None, owners: int
    ) -> None:
        self.start, self.end, self.name = start, start + size, name
        # From the line it begins in, so that what is aligned in memory is aligned here.
        self.base, extent = _lines(start, size)
        buffer = (ctypes.c_uint8 * extent).from_address(self.base)
        self.data = np.ctypeslib.as_array(buffer)
        self.elements = Elements(self.data)
        # Blocks race with others only, and no barrier orders them.
        self.touches = Touches(extent, owners, Epochs(1)) if owners > 1 else None
        self.written = None if written is None else Marks(written)


def _lines(start: int, size: int) -> tuple[int, int]:
    """Beginning and bytes of the lines that hold a storage."""
    base = start - start % LINE
    return base, -(-(start + size - base) // LINE) * LINE


def new_shadow(start: int, size: int) -> Shadow:
    """Nothing of a storage is written: a flag for each byte of its lines."""
    return np.zeros(_lines(start, size)[1], bool)


class GlobalMemory:
    """The storages that a launch may touch.

    Args:
        storages: (address, bytes, name) of each.
        fresh: shadows of those that began uninitialised, by address.
        blocks: how many the launch has.
    """

    def __init__(
        self,
        storages: Iterable[tuple[int, int, str]],
        fresh: Mapping[int, Shadow] = NO_SHADOWS,
        blocks: int = 1,
    ) -> None:
        unique = {start: (size, name) for start, size, name in storages if size}
        self.allocations = [Allocation(a, *unique[a], fresh.get(a), blocks) for a in sorted(unique)]
        self.starts = [allocation.start for allocation in self.allocations]
        self.costs: Costs | None = None

    def _that_holds_all(self, addresses: Ints, size: int) -> Allocation | None:
        """The storage in which all of these accesses lie, if there is one."""
        if not len(addresses):
            return None
        first, last = int(np.minimum.reduce(addresses)), int(np.maximum.reduce(addresses))
        position = bisect_right(self.starts, first) - 1
        if position < 0 or last + size > self.allocations[position].end:
            return None
        return self.allocations[position]

    def _parts(
        self, addresses: Ints, size: int, report: Reporter
    ) -> Iterable[tuple[Allocation, Array]]:
        """Allocations and the positions of `addresses` that fall into each."""
        if not len(addresses):
            return
        if not self.starts:
            report("outside", np.ones(len(addresses), bool), "the launch has no tensors")
            return
        index = np.searchsorted(self.starts, addresses, "right") - 1
        for i in np.unique(index):
            chosen = np.flatnonzero(index == i)
            allocation = self.allocations[max(i, 0)]
            inside = (addresses[chosen] >= allocation.start) & (
                addresses[chosen] + size <= allocation.end
            )
            if not inside.all():
                wrong = np.zeros(len(addresses), bool)
                wrong[chosen[~inside]] = True
                off = int(addresses[chosen[~inside]][0]) - allocation.start
                extent = allocation.end - allocation.start
                report(
                    "outside",
                    wrong,
                    f"{size} bytes at byte {off} of {allocation.name}, which has {extent}",
                )
            yield allocation, chosen[inside]

    def read(self, addresses: Ints, size: int, blocks: Array, report: Reporter) -> Array:
        """Elements of `size` bytes that threads of these blocks read."""
        check_alignment(addresses, size, report)
        holder = self._that_holds_all(addresses, size)
        if holder is not None:
            return self._read_from(holder, addresses, size, blocks, report)
        results = np.zeros(len(addresses), element(size))
        for allocation, chosen in self._parts(addresses, size, report):
            results[chosen] = self._read_from(
                allocation, addresses[chosen], size, blocks[chosen],
                _among(chosen, len(addresses), report),
            )  # fmt: skip
        return results

    def _read_from(
        self, allocation: Allocation, addresses: Ints, size: int, blocks: Array, report: Reporter
    ) -> Array:
        index = (addresses - allocation.base) >> (size.bit_length() - 1)
        written, touches = allocation.written, allocation.touches
        if written is not None and not written.all_marked(index, size):
            report("unwritten", ~written.marked(index, size), f"of {allocation.name}")
        races = None if touches is None else touches.read(index, size, blocks, LAUNCH)
        if races is not None:
            detail = f"another block wrote these bytes of {allocation.name}"
            report("race", races.any(1), detail)
        if self.costs is not None:
            self.costs.touch(allocation.base, index * size, size, len(allocation.data), False)
        return allocation.elements.of(size).take(index)

    def write(
        self, addresses: Ints, elements: Array, size: int, blocks: Array, report: Reporter
    ) -> None:
        """Store an element of `size` bytes of each thread."""
        check_alignment(addresses, size, report)
        holder = self._that_holds_all(addresses, size)
        if holder is not None:
            self._write_to(holder, addresses, elements, size, blocks, report)
            return
        for allocation, chosen in self._parts(addresses, size, report):
            self._write_to(
                allocation, addresses[chosen], elements[chosen], size, blocks[chosen],
                _among(chosen, len(addresses), report),
            )  # fmt: skip

    def _write_to(
        self,
        allocation: Allocation,
        addresses: Ints,
        elements: Array,
        size: int,
        blocks: Array,
        report: Reporter,
    ) -> None:
        index = (addresses - allocation.base) >> (size.bit_length() - 1)
        touches, memory = allocation.touches, allocation.elements.of(size)
        races = None if touches is None else touches.write(index, size, blocks, LAUNCH)
        before = None if races is None else memory.take(index)
        memory[index] = elements
        now = memory.take(index)
        lost = now.tobytes() != elements.tobytes()  # to another thread of this instruction
        if lost or before is not None:
            differ = as_rows(now, size) != as_rows(elements, size)
            if before is not None and races is not None:
                changes = as_rows(before, size) != as_rows(elements, size)
                differ |= changes & races.repeat(size // races.shape[1], 1)
            detail = f"another thread writes other values to these bytes of {allocation.name}"
            report("race", differ.any(1), detail)
        if allocation.written is not None:
            allocation.written.mark(index, size)
        if self.costs is not None:
            self.costs.touch(allocation.base, index * size, size, len(allocation.data), True)

    def atomic(
        self, addresses: Ints, size: int, report: Reporter
    ) -> Iterable[tuple[Allocation, Array]]:
        """Storages and positions of an atomic access, which the caller carries out in turn."""
        check_alignment(addresses, size, report)
        for allocation, chosen in self._parts(addresses, size, report):
            index = (addresses[chosen] - allocation.base) // size
            if allocation.written is not None:
                fresh = ~allocation.written.marked(index, size)
                among = _among(chosen, len(addresses), report)
                among("unwritten", fresh, f"of {allocation.name}")
                allocation.written.mark(index, size)
            if self.costs is not None:
                extent = len(allocation.data)
                self.costs.touch(allocation.base, index * size, size, extent, writes=False)
                self.costs.touch(allocation.base, index * size, size, extent, writes=True)
            yield allocation, chosen


def _among(chosen: Array, total: int, report: Reporter) -> Reporter:
    """Reports faults of some of the accesses."""

    def report_chosen(kind: str, wrong: Any, detail: str) -> None:
        flags = np.zeros(total, bool)
        flags[chosen] = wrong
        report(kind, flags, detail)

    return report_chosen


def check_alignment(addresses: Ints, size: int, report: Reporter) -> None:
    """Fault where an access does not begin at a multiple of its size, a power of two."""
    if len(addresses) and int(np.bitwise_or.reduce(addresses)) & (size - 1):
        wrong = addresses & (size - 1) != 0
        report("misaligned", wrong, f"{size} bytes must begin at a multiple of {size}")
