"""Execution of a grid: registers of many blocks as arrays, threads in step where they agree.

All threads of a batch of blocks run side by side: a register is an array with an element per
thread (or one element, where all threads hold the same). Where threads disagree about a branch,
those furthest behind run first, so that they meet again as early as the code allows; a warp-wide
instruction that not all its lanes reach together is a fault. Blocks run in order of their index,
batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .asynchronous import Copies, Products
from .chains import Chains
from .code import Code, Mask
from .count import Costs
from .faults import Collector, Fault, Place
from .memory import GlobalMemory, Reporter, SharedMemory
from .parse import Instruction, Program, PtxError
from .registers import UNSIGNED

Array = NDArray[Any]

LANES = 32
DONE = 1 << 30
"""The place of threads that have returned."""


@dataclass
class Counts:
    """How often warps issued each instruction, and what it cost where that was asked for.

    Args:
        issued: by index of the instruction: warps that had an active lane.
        partial: those of them in which some lanes were switched off by a branch.
        executed_blocks, blocks: of the grid; fewer than all where blocks were sampled.
        costs: memory and matrix work; None where nobody asked.
    """

    issued: NDArray[np.int64]
    partial: NDArray[np.int64]
    executed_blocks: int
    blocks: int
    costs: Costs | None = None


class Machine:
    """A batch of blocks in execution.

    Args:
        code: the decoded kernel.
        grid: blocks along x, y, z.
        blocks: indices of the batch's blocks in the grid.
        parameters: name -> bits, as arrays of one element.
        memory: global memory.
        shared_bytes: of each block.
        collector: where faults go.
        counts: to add to.
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
        counts: Counts,
    ) -> None:
        self.code, self.program = code, code.program
        self.parameters, self.memory, self.collector = parameters, memory, collector
        self.counts = counts
        threads, count = self.program.threads, len(blocks)
        self.n_threads, self.n = threads, threads * count
        self.block = np.repeat(np.arange(count), threads)  # in the batch
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), count)
        self.warp = (self.thread // LANES).astype(np.int32)
        self.block_index = blocks[self.block]
        self.special = _special_registers(self, grid)
        self.shared = SharedMemory(count, shared_bytes)
        self.warp_index = np.arange(self.n) // LANES  # in the batch
        self.epoch = np.zeros(count, np.int32)  # barriers that each block has passed
        self.copies, self.products = Copies(self), Products(self)
        self.values: list[Array] = [np.zeros(1, np.uint32)] * (
            len(code.slots) + len(code.constants)
        )
        for name, slot in code.slots.items():
            bits = self.program.registers[name]
            self.values[slot] = np.zeros(1, bool if bits == 1 else UNSIGNED[bits])
        for slot, value in code.constants:
            self.values[slot] = value
        self.current: Instruction = self.program.instructions[0]
        self.chains = None if counts.costs is None else Chains(code)

    # Registers

    def set(self, slot: int, value: Array, mask: Mask) -> None:
        self.values[slot] = value if mask is None else np.where(mask, value, self.values[slot])

    def active(self, mask: Mask) -> Array:
        """Indices of the active threads."""
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def of(self, slot: int, threads: Array) -> Array:
        """A register of these threads."""
        value = self.values[slot]
        return np.broadcast_to(value, threads.shape) if len(value) == 1 else value[threads]

    def whole(self, slot: int) -> Array:
        """A register of all threads."""
        return np.broadcast_to(self.values[slot], (self.n,))

    # Faults

    def fault(self, kind: str, thread: int | None, detail: str) -> None:
        place = None
        if thread is not None:
            place = Place(int(self.block_index[thread]), int(self.thread[thread]))
        self.collector.report(Fault(kind, self.program.name, self.current, place, detail))

    def reporter(self, threads: Array) -> Reporter:
        """Reports faults of an access by these threads."""

        def report(kind: str, wrong: Any, detail: str) -> None:
            if wrong.any():
                self.fault(kind, int(threads[np.flatnonzero(wrong)[0]]), detail)

        return report

    def require_whole_warps(self, mask: Mask, what: str = "all 32 lanes") -> None:
        """A warp-wide instruction needs every lane of each warp that takes part."""
        if mask is None:
            return
        by_warp = np.broadcast_to(mask, (self.n,)).reshape(-1, LANES)
        partial = by_warp.any(1) & ~by_warp.all(1)
        if partial.any():
            thread = int(np.flatnonzero(partial)[0]) * LANES
            self.fault("barrier", thread, f"expected {what} of the warp here, got some")

    # Flow

    def run(self) -> None:
        """Execute to the end.

        Raises:
            Fault: unless the collector keeps it.
            PtxError: a step is of a kind that is not known here.
        """
        pcs, waiting = np.zeros(self.n, np.int64), np.zeros(self.n, bool)
        while True:
            runnable = (pcs != DONE) & ~waiting
            if not runnable.any():
                if not waiting.any():
                    break
                thread = int(np.flatnonzero(waiting)[0])
                self.current = self.program.instructions[pcs[thread]]
                self.fault("barrier", thread, "some threads of the block never reach this barrier")
                pcs[waiting] += 1
                waiting[:] = False
                continue
            pc = int(pcs[runnable].min())
            here = runnable & (pcs == pc)
            mask: Mask = None if here.all() else here
            self._straight_run(pc, self.code.ends[pc], mask)
            self._leave(self.code.ends[pc], mask, pcs, waiting)
        self.copies.finish()
        self.products.finish()
        if self.chains is not None and self.counts.costs is not None:
            longest = max(self.counts.costs.longest_chain, self.chains.longest)
            self.counts.costs.longest_chain = longest

    def _straight_run(self, begin: int, end: int, mask: Mask) -> None:
        instructions, steps = self.program.instructions, self.code.steps
        self._count(begin, min(end + 1, len(steps)), mask)
        for index in range(begin, end):
            self.current = instruction = instructions[index]
            step = steps[index]
            if step is None:
                raise PtxError(_unknown(self.program, instruction))
            if self.products.pending:
                self.products.check(self.code.reads[index], self.code.writes[index])
            if self.chains is not None:
                self.chains.note(index)
            if instruction.predicate is None:
                step(self, mask)
                continue
            chosen = self._predicated(instruction, mask)
            if chosen is None or chosen.any():
                step(self, chosen)

    def _count(self, begin: int, end: int, mask: Mask) -> None:
        """Note that the active warps issue a run of instructions."""
        if mask is None:
            self.counts.issued[begin:end] += self.n // LANES
            return
        by_warp = mask.reshape(-1, LANES)
        active = by_warp.any(1)
        self.counts.issued[begin:end] += int(active.sum())
        self.counts.partial[begin:end] += int((active & ~by_warp.all(1)).sum())

    def _predicated(self, instruction: Instruction, mask: Mask) -> Mask:
        assert instruction.predicate is not None
        predicate = self.whole(self.code.slots[instruction.predicate])
        chosen = ~predicate if instruction.negated else predicate
        chosen = chosen if mask is None else chosen & mask
        return None if chosen.all() else chosen

    def _leave(self, index: int, mask: Mask, pcs: Array, waiting: Array) -> None:
        """The end of a straight run: a branch, a barrier, a return, or a label that follows."""
        kind, target = self.code.flow.get(index, ("next", index))
        here = self.active(mask)
        if kind == "next":
            pcs[here] = DONE if index >= len(self.program.instructions) else index
            return
        self.current = instruction = self.program.instructions[index]
        if kind == "bar":
            self._arrive(here, pcs, waiting, index)
            return
        taken = here
        if instruction.predicate is not None:
            chosen = self._predicated(instruction, mask)
            taken = self.active(chosen)
        pcs[here] = index + 1
        pcs[taken] = DONE if kind == "ret" else target

    def _arrive(self, here: Array, pcs: Array, waiting: Array, index: int) -> None:
        """`bar.sync`: the threads wait until every thread of their block is here."""
        waiting[here] = True
        pcs[here] = index
        arrived = (waiting & (pcs == index)).reshape(-1, self.n_threads)
        complete = arrived.all(1)
        self.epoch[complete] += 1
        released = np.repeat(complete, self.n_threads)
        waiting[released] = False
        pcs[released] = index + 1


def _unknown(program: Program, instruction: Instruction) -> str:
    source = instruction.source or "no source line"
    return (
        f"{program.name}: {instruction.opcode} is not known here"
        f" ({source}, PTX line {instruction.line}: {instruction.text})"
    )


def _special_registers(machine: Machine, grid: tuple[int, int, int]) -> dict[str, Array]:
    """%tid.x and the like. Triton's blocks have one dimension."""
    block = machine.block_index.astype(np.uint32)
    x, y, z = (np.uint32(extent) for extent in grid)
    one, zero = np.ones(1, np.uint32), np.zeros(1, np.uint32)
    return {
        "%tid.x": machine.thread, "%tid.y": zero, "%tid.z": zero,
        "%ntid.x": one * np.uint32(machine.n_threads), "%ntid.y": one, "%ntid.z": one,
        "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
        "%nctaid.x": one * x, "%nctaid.y": one * y, "%nctaid.z": one * z,
        "%laneid": machine.thread % np.uint32(LANES),
        "%warpid": machine.thread // np.uint32(LANES),
        "%clusterid.x": block % x, "%cluster_ctarank": zero, "%cluster_ctaid.x": zero,
    }  # fmt: skip
