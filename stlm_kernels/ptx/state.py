"""State that instructions read and change: registers, memory and what is on its way to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .asynchronous import Copies, Products
from .code import Code
from .count import Costs
from .faults import Collector
from .lanes import LANES
from .local import LocalMemory
from .memory import GlobalMemory
from .progress import Progress
from .registers import Array, Mask
from .shared import SharedMemory
from .threads import Threads


class State(Threads):
    """Registers and memory of a batch of blocks.

    A register is an array with an element per thread (or one element, where all threads hold the
    same).

    Args:
        code: the decoded kernel.
        grid: blocks along x, y, z.
        blocks: indices of the batch's blocks in the grid.
        parameters: name -> bits, as arrays of one element.
        memory: global memory.
        shared_bytes: of each block.
        collector: where faults go.
        costs: memory and matrix work is added to it; None where costs are not counted.
    """

    def __init__(
        self,
        code: Code,
        grid: tuple[int, int, int],
        blocks: NDArray[np.int64],
        parameters: dict[str, Array],
        memory: GlobalMemory,
        shared_bytes: int,
        collector: Collector,
        costs: Costs | None,
    ) -> None:
        super().__init__(code.program, blocks, collector)
        self.values, self.parameters = list(code.registers), parameters
        self.special = _special_registers(self, grid)
        self.memory, self.shared = memory, SharedMemory(self, shared_bytes, code.has_products)
        self.local = LocalMemory(self, code.program.local_bytes)
        self.copies, self.products = Copies(self, self.shared), Products(self, self.shared)
        self.progress = Progress(self)
        self.costs = costs

    def set(self, slot: int, value: Array, mask: Mask) -> None:
        """Set a register of the active threads to a value given for all."""
        self.values[slot] = value if mask is None else np.where(mask, value, self.values[slot])

    def put(self, slot: int, threads: Array, value: Array, mask: Mask) -> None:
        """Set a register of the active threads to values given for those alone."""
        if mask is None:
            self.values[slot] = value
            return
        before = self.values[slot]
        if len(before) == 1 or before.dtype is not value.dtype:
            whole = np.empty(self.n, value.dtype)
            whole[:] = before
        else:
            whole = before.copy()
        whole[threads] = value
        self.values[slot] = whole

    def where_on(self, slot: int, negated: bool, mask: Mask) -> Mask:
        """Select the active threads whose predicate is on.

        Returns:
            None for all of the batch, `no_thread` for none of it.
        """
        predicate = self.values[slot]
        if len(predicate) == 1:
            return mask if bool(predicate[0]) != negated else self.no_thread
        chosen = ~predicate if negated else predicate
        if mask is not None:
            chosen = chosen & mask
        count = np.count_nonzero(chosen)
        if count == len(chosen):
            return None
        return chosen if count else self.no_thread

    def of(self, slot: int, threads: Array) -> Array:
        """A register of these threads."""
        value = self.values[slot]
        if len(value) == 1:
            return value.repeat(len(threads))
        return value if threads is self.every else value[threads]

    def fragments(self, slots: Sequence[int], threads: Array) -> Array:
        """Registers of these threads by warp: (registers, warps, lanes)."""
        arrays = [self.values[slot] for slot in slots]
        count = len(arrays)
        found = np.concatenate(arrays) if threads is self.every else None
        if found is None or len(found) != count * self.n:
            found = np.stack([self.of(slot, threads) for slot in slots])
        return found.reshape(count, -1, LANES)

    def whole(self, slot: int) -> Array:
        """A register of all threads."""
        value = self.values[slot]
        return value.repeat(self.n) if len(value) == 1 else value


PLACES_OF_A_THREAD = 96
"""Bytes of a thread's indices and special registers."""


def state_bytes(code: Code, shared_bytes: int) -> int:
    """The most bytes that the registers and memory of a block take."""
    local = LocalMemory.BYTES_OF_A_BYTE * code.program.local_bytes
    of_a_thread = code.register_bytes + local + PLACES_OF_A_THREAD
    return code.program.threads * of_a_thread + SharedMemory.BYTES_OF_A_BYTE * shared_bytes


def _special_registers(threads: Threads, grid: tuple[int, int, int]) -> dict[str, Array]:
    """%tid.x and the like. Triton's blocks have one dimension."""
    block = threads.block_index.astype(np.uint32)
    x, y, z = (np.uint32(extent) for extent in grid)
    one, zero = np.ones(1, np.uint32), np.zeros(1, np.uint32)
    return {
        "%tid.x": threads.thread, "%tid.y": zero, "%tid.z": zero,
        "%ntid.x": one * np.uint32(threads.n_threads), "%ntid.y": one, "%ntid.z": one,
        "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
        "%nctaid.x": one * x, "%nctaid.y": one * y, "%nctaid.z": one * z,
        "%laneid": threads.thread % np.uint32(LANES),
        "%warpid": threads.thread // np.uint32(LANES),
        "%clusterid.x": block % x, "%cluster_ctarank": zero, "%cluster_ctaid.x": zero,
    }  # fmt: skip
