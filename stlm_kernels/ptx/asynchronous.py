"""Copies and products that complete later: what is on its way, and what a wait completes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import SharedMemory, bytes_at
from .registers import Array, Mask
from .threads import Threads


@dataclass
class _Copy:
    threads: Array
    places: Array  # (threads, bytes) in shared memory
    data: NDArray[np.uint8]
    group: Array  # of each thread, counted from its first
    instruction: Any


class Copies:
    """`cp.async`: bytes read when issued, in shared memory once the issuing thread has waited."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self.batch, self.shared = threads, shared
        self.committed = np.zeros(threads.n, np.int64)
        self.on_the_way: list[_Copy] = []

    def issue(self, threads: Array, offsets: Array, data: NDArray[np.uint8]) -> None:
        """Begin copies of the rows of data to offsets of shared memory."""
        batch, memory = self.batch, self.shared
        report = batch.reporter(threads)
        size = data.shape[1]
        first = memory.places(offsets, batch.block[threads], size, report)
        places = bytes_at(first, size)
        report("async", memory.pending[places].any(1), "two copies to the same bytes")
        epochs = batch.epoch[batch.block[threads]]
        races = memory.note_write(places, batch.warp[threads], epochs)
        report("race", races.any(1), "another warp touches it since the last barrier")
        memory.pending[places] = True
        group = self.committed[threads].copy()
        self.on_the_way.append(_Copy(threads, places, data, group, batch.current))

    def commit(self, mask: Mask) -> None:
        self.committed[self.batch.active(mask)] += 1

    def wait(self, mask: Mask, newest: int) -> None:
        """Complete all but the `newest` groups of these threads."""
        waits = np.zeros(self.batch.n, bool)
        waits[self.batch.active(mask)] = True
        left = []
        for copy in self.on_the_way:
            done = waits[copy.threads] & (copy.group < self.committed[copy.threads] - newest)
            self._land(copy, done)
            if not done.all():
                left.append(
                    _Copy(
                        copy.threads[~done],
                        copy.places[~done],
                        copy.data[~done],
                        copy.group[~done],
                        copy.instruction,
                    )
                )
        self.on_the_way = left

    def _land(self, copy: _Copy, done: Array) -> None:
        batch, shared = self.batch, self.shared
        if not done.any():
            return
        threads, places = copy.threads[done], copy.places[done]
        shared.data[places] = copy.data[done]
        shared.pending[places] = False
        # They count as written now: other warps need a barrier after this wait.
        shared.owners.writer[places] = batch.warp[threads][:, None]
        shared.owners.written_at[places] = batch.epoch[batch.block[threads]][:, None]

    def finish(self) -> None:
        """Copies that nobody waited for end with the kernel: nothing reads them."""
        self.on_the_way = []


class Products:
    """`wgmma`: accumulators that may not be touched before `wait_group`.

    Values are computed when issued; registers are marked until the group they belong to is done.
    """

    def __init__(self, threads: Threads) -> None:
        self.batch = threads
        self.pending: dict[int, int] = {}  # slot -> group
        self.group = 0

    def issue(self, slots: list[int]) -> None:
        for slot in slots:
            self.pending[slot] = self.group

    def commit(self) -> None:
        self.group += 1

    def wait(self, newest: int) -> None:
        self.pending = {s: g for s, g in self.pending.items() if g >= self.group - newest}

    def check(self, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        """Fault where an instruction touches a register of a product that was not waited for."""
        is_product = self.batch.current.parts[0] == "wgmma"
        slots = reads if is_product else (*reads, *writes)  # products may share their sums
        if not self.pending.keys().isdisjoint(slots):
            self.batch.fault("async", None, "the product in its registers was not waited for")

    def finish(self) -> None:
        self.pending = {}
