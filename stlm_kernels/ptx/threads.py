"""The threads of a batch of blocks, and faults that name one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Collector, Fault, Place, Reporter
from .lanes import LANES
from .parse import Instruction, Program
from .registers import Array, Mask


class Threads:
    """Threads of several blocks side by side, block after block.

    Args:
        program: the kernel.
        blocks: indices of the batch's blocks in the grid.
        collector: where faults go.
    """

    def __init__(self, program: Program, blocks: NDArray[np.int64], collector: Collector) -> None:
        self.program, self.collector = program, collector
        count = len(blocks)
        self.n_threads, self.n = program.threads, program.threads * count
        self.block = np.repeat(np.arange(count), self.n_threads)  # in the batch
        self.thread = np.tile(np.arange(self.n_threads, dtype=np.uint32), count)
        self.warp = (self.thread // LANES).astype(np.int32)
        self.block_index = blocks[self.block]
        self.warp_index = np.arange(self.n) // LANES  # in the batch
        self.every = np.arange(self.n)
        self.owner = self.block_index.astype(np.int32)  # of what a thread does to global memory
        self.epoch = np.zeros(count, np.int32)  # barriers that each block has passed
        self.barriers = 0  # that any block has passed: epochs are the same while it is
        self._threads_of_epochs, self._barriers_of_epochs, self._epochs = self.every, -1, self.epoch
        self.current: Instruction = program.instructions[0]
        self._mask_of_active: Mask = None
        self._mask_of_warps: Mask = None
        self._active, self._warps = self.every, (0, 0)

    def active(self, mask: Mask) -> Array:
        """Indices of the active threads: `every` where all are."""
        if mask is None:
            return self.every
        if mask is not self._mask_of_active:  # the same for a whole run, mostly
            self._mask_of_active, self._active = mask, mask.nonzero()[0]
        return self._active

    def warps(self, mask: Array) -> tuple[int, int]:
        """Count the warps with an active lane, and those of them with one that is not."""
        if mask is not self._mask_of_warps:
            by_warp = mask.reshape(-1, LANES)
            active, whole = (int(np.count_nonzero(x)) for x in (by_warp.any(1), by_warp.all(1)))
            self._mask_of_warps, self._warps = mask, (active, active - whole)
        return self._warps

    def of_threads(self, values: Array, threads: Array) -> Array:
        """The values of these threads out of those of all."""
        return values if threads is self.every else values[threads]

    def epochs(self, threads: Array) -> Array:
        """The epoch of each of these threads' blocks, now; the same array until it changes."""
        if threads is not self._threads_of_epochs or self.barriers != self._barriers_of_epochs:
            self._threads_of_epochs, self._barriers_of_epochs = threads, self.barriers
            self._epochs = self.epoch[self.of_threads(self.block, threads)]
        return self._epochs

    def pass_barrier(self, blocks: Any) -> None:
        """These blocks, as an index, are in their next epoch."""
        self.epoch[blocks] += 1
        self.barriers += 1

    def fault(self, kind: str, thread: int | None, detail: str) -> None:
        place = None
        if thread is not None:
            place = Place(int(self.block_index[thread]), int(self.thread[thread]))
        self.collector.report(Fault(kind, self.program.name, self.current, place, detail))

    def reporter(self, threads: Array) -> Reporter:
        """Reports faults of an access by these threads."""

        def report(kind: str, wrong: Any, detail: str) -> None:
            if np.count_nonzero(wrong):
                self.fault(kind, int(threads[np.flatnonzero(wrong)[0]]), detail)

        return report

    def require_whole_warps(self, mask: Mask, what: str = "all 32 lanes") -> None:
        """A warp-wide instruction needs every lane of each warp that takes part."""
        if mask is not None and self.warps(mask)[1]:
            by_warp = mask.reshape(-1, LANES)
            partial = by_warp.any(1) & ~by_warp.all(1)
            thread = int(np.flatnonzero(partial)[0]) * LANES
            self.fault("barrier", thread, f"expected {what} of the warp here, got some")
