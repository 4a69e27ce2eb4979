"""Local memory by byte and thread: arrays that a thread keeps for itself."""

from __future__ import annotations

import numpy as np

from .faults import Reporter
from .memory import Ints, check_alignment, gather, mark, marked, scatter
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

    def __init__(self, batch: Threads, size: int) -> None:
        self.size, self.pitch = size, -(-size // ALIGNMENT) * ALIGNMENT
        self.data = np.zeros(batch.n * self.pitch, np.uint8)
        self.written = np.zeros(len(self.data), bool)

    def read(
        self, offsets: Ints, width: int, count: int, threads: Array, report: Reporter
    ) -> list[Array]:
        """Words per thread."""
        size = width * count
        places = self._places(offsets, size, threads, report)
        report("unwritten", ~marked(self.written, places // size, size), "of local memory")
        return gather(self.data, places, width, count)

    def write(self, offsets: Ints, values: list[Array], threads: Array, report: Reporter) -> None:
        size = values[0].dtype.itemsize * len(values)
        places = self._places(offsets, size, threads, report)
        scatter(self.data, places, values)
        mark(self.written, places // size, size)

    def _places(self, offsets: Ints, size: int, threads: Array, report: Reporter) -> Ints:
        """Positions in `data`, of all of the accesses."""
        check_alignment(offsets, size, report)
        outside = (offsets < 0) | (offsets + size > self.size)
        if np.count_nonzero(outside):
            detail = f"{size} bytes beyond the {self.size} of local memory"
            report("outside", outside, detail)
            offsets = np.where(outside, 0, offsets)
        return offsets // size * size + threads * self.pitch
