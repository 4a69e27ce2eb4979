"""Bytes and their shadows, and global memory.

An access is an array of addresses, one per active thread, of `count` words of `width` bytes. Global
addresses are those of the tensors themselves: results land where torch sees them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .count import Costs
from .faults import Reporter
from .touches import Touches

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MARKS = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}
LINE = 128
"""Storages are seen from the line they begin in: no access crosses one."""
LAUNCH = 0
"""The one epoch of global memory: nothing orders the blocks of a launch."""

Ints = NDArray[np.int64]
Array = NDArray[Any]
Shadow = NDArray[np.bool_]
"""Flags of the bytes of a storage's lines that something has written; see `new_shadow`."""
NO_SHADOWS: Mapping[int, Shadow] = {}


def gather(data: NDArray[np.uint8], offsets: Ints, width: int, count: int) -> list[Array]:
    """Words of `width` bytes at aligned byte offsets, `count` in a row from each."""
    words = data[: len(data) // width * width].view(WORDS[width])
    first = offsets // width
    return [words[first + i] for i in range(count)]


def scatter(data: NDArray[np.uint8], offsets: Ints, values: list[Array]) -> None:
    """The inverse of `gather`; where offsets repeat, the last thread's value stays."""
    width = values[0].dtype.itemsize
    words = data[: len(data) // width * width].view(WORDS[width])
    first = offsets // width
    for i, value in enumerate(values):
        words[first + i] = value


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
        self.touches = Touches(extent, owners)
        self.written = written


def _lines(start: int, size: int) -> tuple[int, int]:
    """Beginning and bytes of the lines that hold a storage."""
    base = start - start % LINE
    return base, -(-(start + size - base) // LINE) * LINE


def new_shadow(start: int, size: int) -> Shadow:
    """Nothing of a storage is written: a flag for each byte of its lines."""
    return np.zeros(_lines(start, size)[1], bool)


def rows(table: Array, size: int) -> Array:
    """A table with an entry for each byte as one with a row for each access of `size` bytes."""
    return table.reshape(-1, size)


def _words(flags: Shadow, size: int) -> tuple[Array, int]:
    """Flags of accesses of `size` bytes as rows of words, and the word in which all are set."""
    word = min(size, 8)
    return flags.view(WORDS[word]).reshape(-1, size // word), _MARKS[word]


def marked(flags: Shadow, index: Ints, size: int) -> Array:
    """Return whether all bytes of accesses are marked; each is the `index`-th of its size."""
    words, full = _words(flags, size)
    if words.shape[1] == 1:
        return np.asarray(words[:, 0].take(index) == full)
    return np.asarray((words.take(index, 0) == full).all(1))


def any_marked(flags: Shadow, index: Ints, size: int) -> Array:
    """Return whether any byte of accesses is marked."""
    words, _ = _words(flags, size)
    if words.shape[1] == 1:
        return np.asarray(words[:, 0].take(index) != 0)
    return np.asarray(words.take(index, 0).any(1))


def mark(flags: Shadow, index: Ints, size: int, value: bool = True) -> None:
    """Mark all bytes of accesses, or none."""
    words, full = _words(flags, size)
    words[index] = full if value else 0


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
        self.starts = np.array([a.start for a in self.allocations], np.int64)
        self.costs: Costs | None = None

    def _parts(
        self, addresses: Ints, size: int, report: Reporter
    ) -> Iterable[tuple[Allocation, Array | slice]]:
        """Allocations and the positions of `addresses` that fall into each."""
        if not len(addresses):
            return
        if not len(self.starts):
            report("outside", np.ones(len(addresses), bool), "the launch has no tensors")
            return
        first, last = int(addresses.min()), int(addresses.max())
        allocation = self.allocations[max(int(np.searchsorted(self.starts, first, "right")) - 1, 0)]
        if first >= allocation.start and last + size <= allocation.end:
            yield allocation, slice(None)
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

    def read(
        self, addresses: Ints, width: int, count: int, blocks: Array, report: Reporter
    ) -> list[Array]:
        size = width * count
        check_alignment(addresses, size, report)
        results = [np.zeros(len(addresses), WORDS[width]) for _ in range(count)]
        for allocation, chosen in self._parts(addresses, size, report):
            offsets = addresses[chosen] - allocation.base
            words = gather(allocation.data, offsets, width, count)
            if isinstance(chosen, slice):
                results = words
            else:
                for result, word in zip(results, words, strict=True):
                    result[chosen] = word
            index = offsets // size
            if allocation.written is not None:
                fresh = ~marked(allocation.written, index, size)
                report("unwritten", _among(chosen, fresh, len(blocks)), f"of {allocation.name}")
            races = allocation.touches.read(index, size, blocks[chosen], LAUNCH)
            if np.count_nonzero(races):
                detail = f"another block wrote these bytes of {allocation.name}"
                report("race", _among(chosen, races.any(1), len(blocks)), detail)
            if self.costs is not None:
                self.costs.touch(allocation.base, offsets, size, len(allocation.data), writes=False)
        return results

    def write(self, addresses: Ints, values: list[Array], blocks: Array, report: Reporter) -> None:
        width = values[0].dtype.itemsize
        size = width * len(values)
        check_alignment(addresses, size, report)
        for allocation, chosen in self._parts(addresses, size, report):
            offsets = addresses[chosen] - allocation.base
            words = [value[chosen] for value in values]
            index = offsets // size
            races = allocation.touches.write(index, size, blocks[chosen], LAUNCH)
            differ = np.zeros(len(offsets), bool)
            if np.count_nonzero(races):
                before = gather(allocation.data, offsets, width, len(words))
                changes = as_bytes(before) != as_bytes(words)
                differ = (races & changes.reshape(*races.shape, -1).any(2)).any(1)
            scatter(allocation.data, offsets, words)
            # By another thread in this instruction.
            differ |= _any_differs(gather(allocation.data, offsets, width, len(words)), words)
            if np.count_nonzero(differ):
                detail = f"another thread writes other values to these bytes of {allocation.name}"
                report("race", _among(chosen, differ, len(blocks)), detail)
            if allocation.written is not None:
                mark(allocation.written, index, size)
            if self.costs is not None:
                self.costs.touch(allocation.base, offsets, size, len(allocation.data), writes=True)

    def atomic(
        self, addresses: Ints, report: Reporter, size: int
    ) -> Iterable[tuple[Allocation, Array]]:
        """Storages and positions of an atomic access, which the caller carries out in turn."""
        check_alignment(addresses, size, report)
        every = np.arange(len(addresses))
        for allocation, chosen in self._parts(addresses, size, report):
            yield allocation, every[chosen]


def as_bytes(values: list[Array]) -> NDArray[np.uint8]:
    """Words of each thread as its bytes: (threads, bytes)."""
    return np.stack(values, 1).view(np.uint8)


def _any_differs(left: list[Array], right: list[Array]) -> Array:
    """Return whether a thread's words differ in any."""
    return np.logical_or.reduce([a != b for a, b in zip(left, right, strict=True)])


def _among(chosen: Array | slice, wrong: Any, total: int) -> Array:
    flags = np.zeros(total, bool)
    flags[chosen] = wrong
    return flags


def check_alignment(addresses: Ints, size: int, report: Reporter) -> None:
    report("misaligned", addresses % size != 0, f"{size} bytes must begin at a multiple of {size}")
