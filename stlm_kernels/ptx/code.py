"""A decoded program: what the machine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .parse import Instruction, Program
from .registers import UNSIGNED, Array, Mask

Step = Callable[[Any, Mask], None]
"""Changes a `State`, which holds the code and so is not known here."""


@dataclass(frozen=True)
class Run:
    """Instructions that threads execute in a row: up to the next branch, barrier or label.

    Args:
        begin, end: their indices, without the end.
        lines: steps, each with its first instruction, whether its results are of this run alone
            (they may then be written for all threads, active or not, at less cost), and the
            indices of its instructions: see `packs`.
        has_products: whether one of them is a `wgmma`.
        then: what follows, as `Code.flow` has it, or ("next", end).
    """

    begin: int
    end: int
    lines: tuple[tuple[Step, Instruction, bool, tuple[int, ...]], ...]
    has_products: bool
    then: tuple[str, int]


@dataclass(frozen=True)
class Code:
    """A decoded program.

    Args:
        runs: by the index of their first instruction.
        flow: what follows the runs: index -> ("bra", target), ("ret", 0) or ("bar", 0).
        slots: register name -> index; constants follow.
        constants: (slot, value).
        reads, writes: slots of the registers of each instruction (a product that accumulates: its
            sums are written alone).
    """

    program: Program
    runs: dict[int, Run]
    flow: dict[int, tuple[str, int]]
    slots: dict[str, int]
    constants: list[tuple[int, Array]]
    reads: list[tuple[int, ...]]
    writes: list[tuple[int, ...]]

    @cached_property
    def registers(self) -> list[Array]:
        """Registers of zeros, then the constants; nothing changes such an array in place."""
        zeros = {bits: np.zeros(1, UNSIGNED.get(bits, bool)) for bits in (1, 8, 16, 32, 64)}
        values = [zeros[self.program.registers[name]] for name in self.slots]
        return values + [value for _, value in self.constants]

    @cached_property
    def issues(self) -> tuple[Array, Array]:
        """The instructions of all runs, and of each the first one of its run.

        What ends a run is of it too: a branch that bears a label is so of several.
        """
        ends = [(begin, run.end + (run.end in self.flow)) for begin, run in self.runs.items()]
        instructions = [np.arange(*pair) for pair in ends]
        firsts = [np.full(end - begin, begin) for begin, end in ends]
        return np.concatenate(instructions), np.concatenate(firsts)

    @cached_property
    def register_bytes(self) -> int:
        """Bytes of a thread's registers."""
        return sum(max(bits // 8, 1) for bits in self.program.registers.values())

    @cached_property
    def has_products(self) -> bool:
        return any(run.has_products for run in self.runs.values())
