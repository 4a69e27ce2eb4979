"""Local memory by byte and thread: arrays that a thread keeps for itself."""

from __future__ import annotations

import numpy as np

from .elements import Elements, Ints, Marks
from .faults import Reporter
from .memory import check_alignment
from .registers import Array
from .threads import Threads

ALIGNMENT = 16
"""No access is larger, so what is aligned in a thread's memory is aligned here."""


class LocalMemory:
    """Local memory of the threads, one after the other.

    Args:
        batch: the threads.
        size: bytes of each.
    """

    BYTES_OF_A_BYTE = 2
    """The byte, and the flag of whether it was written."""

    def __init__(self, batch: Threads, size: int) -> None:
        self.size, self.pitch = size, -(-size // ALIGNMENT) * ALIGNMENT
        self.elements = Elements(np.zeros(batch.n * self.pitch, np.uint8))
        self.written = Marks(np.zeros(batch.n * self.pitch, bool))

    def read(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Array:
        """An element of `size` bytes for each thread."""
        index = self._index(offsets, size, threads, report)
        if not self.written.all_marked(index, size):
            report("unwritten", ~self.written.marked(index, size), "of local memory")
        return self.elements.of(size).take(index)

    def write(
        self, offsets: Ints, elements: Array, size: int, threads: Array, report: Reporter
    ) -> None:
        """Store an element of `size` bytes of each thread."""
        index = self._index(offsets, size, threads, report)
        self.elements.of(size)[index] = elements
        self.written.mark(index, size)

    def _index(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Places of the accesses: each is the index-th of its size."""
        check_alignment(offsets, size, report)
        outside = (offsets < 0) | (offsets + size > self.size)
        if np.count_nonzero(outside):
            detail = f"{size} bytes beyond the {self.size} of local memory"
            report("outside", outside, detail)
            offsets = np.where(outside, 0, offsets)
        return (offsets + threads * self.pitch) >> (size.bit_length() - 1)
