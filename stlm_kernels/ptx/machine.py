"""Execution of a grid: registers of many blocks as arrays, threads in step where they agree.

All threads of a batch of blocks run side by side: a register is an array with an element per
thread (or one element, where all threads hold the same). Where threads disagree about a branch,
those furthest behind run first, so that they meet again as early as the code allows; a warp-wide
instruction that not all its lanes reach together is a fault. Blocks run in order of their index,
batch by batch; a batch that waits for what a later one stores is put off.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chains import Chains
from .code import Code, Run
from .count import Costs
from .faults import Collector
from .lanes import LANES
from .memory import GlobalMemory
from .parse import Instruction
from .progress import fingerprint
from .registers import Array, Mask
from .state import State

DONE = 1 << 30
"""The place of threads that have returned."""


@dataclass
class Counts:
    """Counts of warps that issued each instruction, and its costs where they were asked for.

    Args:
        issued: by index of the instruction: warps that had an active lane.
        partial: those of them in which some lanes were switched off by a branch.
        executed_blocks, blocks: of the grid; fewer than all where blocks were sampled.
        costs: memory and matrix work; None where they were not asked for.
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
        self.code, self.program, self.counts = code, code.program, counts
        self.state = State(
            code, grid, blocks, parameters, memory, shared_bytes,
            collector, counts.costs,
        )  # fmt: skip
        self.pcs = np.zeros(self.state.n, np.int32)
        # Warps that issued each run, by its first instruction, and those of them in part.
        self._issued, self._partial = ([0] * len(counts.issued) for _ in range(2))
        self.chains = None if counts.costs is None else Chains(code)

    def run(self) -> Iterator[bool]:
        """Execute to the end, and pause where its threads wait for what another batch stores.

        Yields:
            Whether something has changed since it began or was resumed.

        Raises:
            Fault: unless the collector keeps it.
            PtxError: a step is of a kind that is not known here.
        """
        pc = 0
        while pc != DONE:
            pc = yield from self._run_together(pc)
            if pc != DONE:
                pc = yield from self._run_apart(pc)
        if self.chains is not None and self.counts.costs is not None:
            longest = max(self.counts.costs.longest_chain, self.chains.longest)
            self.counts.costs.longest_chain = longest
        self.add_counts()
        # Its parts refer to each other, so that it would stay until Python looks for cycles.
        vars(self.state).clear()

    def report_deadlock(self) -> None:
        """Report a thread that waits for what nothing will store."""
        self.state.current, thread = self.state.progress.last_look
        sampled = self.counts.executed_blocks < self.counts.blocks
        others = "other thread of those that run here" if sampled else "other thread"
        detail = f"waits for a store that no {others} makes"
        self.state.fault("deadlock", thread, detail)

    def fingerprint(self) -> int:
        """A number for where all threads are and what their registers hold."""
        return fingerprint(self.pcs, *self.state.values)

    def _run_together(self, pc: int) -> Generator[bool, None, int]:
        """Execute while all threads are at one place.

        Returns:
            The index of the instruction that only some threads follow, not yet executed, or `DONE`.
        """
        state, runs, instructions = self.state, self.code.runs, self.program.instructions
        while pc < len(instructions):
            if state.progress.watching and state.progress.pauses(not state.progress.waits.all()):
                self.pcs[:] = pc
                yield state.progress.take_advanced()
            run = runs[pc]
            self._straight_run(run, None)
            end, (kind, target) = run.end, run.then
            if kind == "next":
                pc = end
                continue
            state.current = instruction = instructions[end]
            taken = self._predicated(instruction, None)
            if taken is not None and (kind == "bar" or taken is not state.no_thread):
                return end
            if kind == "bar":
                state.clock.advance(None)
            elif kind == "ret" and taken is None:
                return DONE
            pc = target if kind == "bra" and taken is None else end + 1
        return DONE

    def _run_apart(self, index: int) -> Generator[bool, None, int]:
        """Execute from a branch or barrier that only some threads follow.

        Returns:
            The place where all threads are together again, or `DONE`.
        """
        state, pcs = self.state, self.pcs
        pcs[:], waiting = index, np.zeros(state.n, bool)
        self._leave(index, None, pcs, waiting)
        while True:
            runnable = (pcs != DONE) & ~waiting
            if not runnable.any():
                if not waiting.any():
                    return DONE
                self._stuck(pcs, waiting)
                continue
            able = state.progress.able(runnable)
            any_able = bool(able.any())
            if state.progress.watching and state.progress.pauses(any_able):
                yield state.progress.take_advanced()
            if not any_able:
                continue
            pc = int(pcs[able].min())
            here = able & (pcs == pc)
            if here.all():
                return pc
            others = pcs[runnable & ~here]
            self._run_group(pc, here, int(others.min()) if len(others) else DONE, waiting)

    def _run_group(self, pc: int, here: Array, others: int, waiting: Array) -> None:
        """Execute threads while they stay together, behind those others that can run.

        Args:
            pc: their place.
            here: the threads.
            others: the place that is next among the other threads'.
            waiting: threads at a barrier.
        """
        state, pcs = self.state, self.pcs
        while True:
            run = self.code.runs[pc]
            self._straight_run(run, here)
            kind, target = run.then
            if kind == "next":
                pc = run.end
            elif kind == "bra":
                state.current = instruction = self.program.instructions[run.end]
                taken = self._predicated(instruction, here)
                count = state.n if taken is None else int(np.count_nonzero(taken))
                if count == len(state.active(here)):
                    pc = target
                elif count == 0:
                    pc = run.end + 1
                else:
                    self._leave(run.end, here, pcs, waiting)
                    return
            else:
                self._leave(run.end, here, pcs, waiting)
                return
            if pc >= others or state.progress.watching or pc >= len(self.program.instructions):
                pcs[here] = DONE if pc >= len(self.program.instructions) else pc
                return

    def _stuck(self, pcs: Array, waiting: Array) -> None:
        """No thread can go on: those at a barrier pass it once the fault was kept."""
        thread = int(np.flatnonzero(waiting)[0])
        self.state.current = self.program.instructions[pcs[thread]]
        self.state.fault("barrier", thread, "some threads of the block never reach this barrier")
        pcs[waiting] += 1
        waiting[:] = False

    def _straight_run(self, run: Run, mask: Mask) -> None:
        """Execute instructions that the active threads take in a row."""
        state = self.state
        self._count(run, mask)
        state.progress.turn()
        if self.chains is not None:
            for index in range(run.begin, run.end):
                self.chains.note(index)
        if run.has_products or state.products.pending:
            self._run_with_products(run, mask)
        elif mask is None:
            for step, state.current, _, _ in run.lines:
                step(state, None)
        else:
            for step, state.current, is_own, _ in run.lines:
                step(state, None if is_own else mask)
        if state.progress.watching:
            state.progress.end_of_run(mask)

    def _run_with_products(self, run: Run, mask: Mask) -> None:
        """Execute a run while no register of a product that is on its way may be touched."""
        state, reads, writes = self.state, self.code.reads, self.code.writes
        for step, first, is_own, indices in run.lines:
            if state.products.pending:
                for index in indices:
                    state.current = self.program.instructions[index]
                    state.products.check(reads[index], writes[index], mask)
            state.current = first
            step(state, None if is_own else mask)

    def _count(self, run: Run, mask: Mask) -> None:
        """Note that the active warps issue a run of instructions, and the branch that ends it."""
        if mask is None:
            self._issued[run.begin] += self.state.n // LANES
            return
        active, partial = self.state.warps(mask)
        self._issued[run.begin] += active
        self._partial[run.begin] += partial

    def add_counts(self) -> None:
        """Add what was noted to the counts of the launch."""
        instructions, firsts = self.code.issues
        np.add.at(self.counts.issued, instructions, np.array(self._issued)[firsts])
        np.add.at(self.counts.partial, instructions, np.array(self._partial)[firsts])

    def _predicated(self, instruction: Instruction, mask: Mask) -> Mask:
        """Select the active threads that an instruction is on for; None for all of the batch."""
        if instruction.predicate is None:
            return mask
        slot = self.code.slots[instruction.predicate]
        return self.state.where_on(slot, instruction.negated, mask)

    def _leave(self, index: int, mask: Mask, pcs: Array, waiting: Array) -> None:
        """The end of a straight run: a branch, a barrier, a return, or a label that follows."""
        kind, target = self.code.flow.get(index, ("next", index))
        here = self.state.active(mask)
        if kind == "next":
            pcs[here] = DONE if index >= len(self.program.instructions) else index
            return
        self.state.current = instruction = self.program.instructions[index]
        taken = self.state.active(self._predicated(instruction, mask))
        pcs[here] = index + 1
        if kind == "bar":
            self._arrive(taken, pcs, waiting, index)
        else:
            pcs[taken] = DONE if kind == "ret" else target

    def _arrive(self, here: Array, pcs: Array, waiting: Array, index: int) -> None:
        """`bar.sync`: the threads wait until every thread of their block is here."""
        waiting[here] = True
        pcs[here] = index
        arrived = (waiting & (pcs == index)).reshape(-1, self.state.n_threads)
        complete = arrived.all(1)
        self.state.clock.advance(complete)
        released = np.repeat(complete, self.state.n_threads)
        waiting[released] = False
        pcs[released] = index + 1
