"""A decoded program: what the machine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .parse import Program
from .registers import Array, Mask
from .state import State

Step = Callable[[State, Mask], None]


@dataclass(frozen=True)
class Code:
    """A decoded program.

    Args:
        steps: a function per instruction; None for branches and returns, which `flow` holds.
        flow: index -> ("bra", target), ("ret", 0) or ("bar", 0).
        slots: register name -> index; constants follow.
        constants: (slot, value).
        ends: index -> end of the straight run of instructions that begins there.
        reads, writes: slots of the registers of each instruction (a product that accumulates: its
            sums are written alone).
    """

    program: Program
    steps: list[Step | None]
    flow: dict[int, tuple[str, int]]
    slots: dict[str, int]
    constants: list[tuple[int, Array]]
    ends: list[int]
    reads: list[tuple[int, ...]]
    writes: list[tuple[int, ...]]
