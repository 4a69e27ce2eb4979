"""A decoded program: what the machine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .parse import Instruction, Program
from .registers import Array, Mask
from .state import State

Step = Callable[[State, Mask], None]


@dataclass(frozen=True)
class Run:
    """Instructions that threads execute in a row: up to the next branch, barrier or label.

    Args:
        begin, end: their indices, without the end.
        lines: the step of each, the instruction, and whether its result is of this run alone: it
            may then be written for all threads, active or not, at less cost.
        has_products: whether one of them is a `wgmma`.
    """

    begin: int
    end: int
    lines: tuple[tuple[Step, Instruction, bool], ...]
    has_products: bool


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
