"""The threads of a batch of blocks, and faults that name one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Collector, Fault, Place, Reporter
from .lanes import LANES
from .parse import Instruction, Program
from .registers import Array, Mask
from .touches import Epochs

MASKS_KNOWN = 32
"""Masks whose threads are kept: loops come back to the same."""


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
        self.no_thread = np.zeros(self.n, bool)
        self.owner = self.block_index.astype(np.int32)  # of what a thread does to global memory
        self.clock = Epochs(count)
        self.epoch = self.clock.of_blocks
        self._threads_of_epochs, self._change_of_epochs, self._epochs = self.every, -1, self.epoch
        self.current: Instruction = program.instructions[0]
        self._mask_of_warps: Mask = None
        self._warps = (0, 0)
        self._mask_of_active: Mask = None
        self._active = self.every
        self._known_masks: dict[int, tuple[Array, Array, dict[int, Array]]] = {}
        self._of_active: dict[int, Array] = {}  # what `of_threads` found for the active threads

    def active(self, mask: Mask) -> Array:
        """Indices of the active threads: `every` where all are."""
        if mask is None:
            return self.every
        if mask is not self._mask_of_active:
            known = self._known_masks.get(id(mask))
            if known is None:
                if len(self._known_masks) == MASKS_KNOWN:
                    self._known_masks.clear()
                known = self._known_masks[id(mask)] = mask, mask.nonzero()[0], {}
            self._mask_of_active, self._active, self._of_active = known
        return self._active

    def warps(self, mask: Array) -> tuple[int, int]:
        """Count the warps with an active lane, and those of them with one that is not."""
        if mask is not self._mask_of_warps:
            by_warp = mask.reshape(-1, LANES)
            active, whole = (int(np.count_nonzero(x)) for x in (by_warp.any(1), by_warp.all(1)))
            self._mask_of_warps, self._warps = mask, (active, active - whole)
        return self._warps

    def of_threads(self, values: Array, threads: Array) -> Array:
        """The values of these threads out of those of all, which stay as they are."""
        if threads is self.every:
            return values
        if threads is not self._active:
            return values[threads]
        found = self._of_active.get(id(values))
        if found is None:
            found = self._of_active[id(values)] = values[threads]
        return found

    def epochs(self, threads: Array) -> Array:
        """The epoch of each of these threads' blocks, now, or one where it is the same for all.

        It is the same array until epochs change.
        """
        clock = self.clock
        threads = self.every if clock.are_same else threads
        if threads is not self._threads_of_epochs or clock.changes != self._change_of_epochs:
            self._threads_of_epochs, self._change_of_epochs = threads, clock.changes
            blocks = slice(1) if clock.are_same else self.of_threads(self.block, threads)
            self._epochs = self.epoch[blocks].copy()
        return self._epochs

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
