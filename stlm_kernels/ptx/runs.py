"""Straight runs of a program: the instructions that threads execute in a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from .code import Run, Step
from .parse import Program

FOR_ACTIVE = (
    "ld", "ldu", "atom", "shfl", "redux", "vote", "elect", "activemask", "ldmatrix", "mma", "wgmma",
)  # fmt: skip
"""Instructions whose result depends on which threads are active, or that only those may execute."""


def _begins(program: Program, flow: Mapping[int, object]) -> list[int]:
    """Indices where runs begin: after branches and barriers, and at labels."""
    begins = {0, *(index + 1 for index in flow), *program.labels.values()}
    return sorted(index for index in begins if index <= len(program.instructions))


def own_results(
    program: Program,
    flow: Mapping[int, object],
    reads: Sequence[tuple[int, ...]],
    writes: Sequence[tuple[int, ...]],
) -> list[bool]:
    """Return which instructions write only registers that no other run touches.

    Such a register is written before it is read, and threads wait between runs alone, so none has
    a value there that counts while others write.
    """
    begins = _begins(program, flow)
    run_of = [bisect_right(begins, index) for index in range(len(program.instructions))]
    home: dict[int, int] = {}
    shared: set[int] = set()
    for index, instruction in enumerate(program.instructions):
        is_whole = instruction.predicate is None
        for slot in (*reads[index], *writes[index]):
            is_first_write = is_whole and slot in writes[index] and slot not in reads[index]
            if home.setdefault(slot, run_of[index] if is_first_write else 0) != run_of[index]:
                shared.add(slot)
    return [
        instruction.predicate is None and bool(written) and shared.isdisjoint(written)
        for instruction, written in zip(program.instructions, writes, strict=True)
    ]


def runs_of(
    program: Program, flow: Mapping[int, object], steps: Sequence[Step], own: Sequence[bool]
) -> dict[int, Run]:
    """Return the straight runs by the index where they begin."""
    instructions = program.instructions
    begins = _begins(program, flow)
    found = {}
    for begin, following in zip(begins, [*begins[1:], len(instructions)], strict=True):
        end = following - 1 if following - 1 in flow and following > begin else following
        within = instructions[begin:end]
        may_write_all = [
            is_own and instruction.parts[0] not in FOR_ACTIVE
            for is_own, instruction in zip(own[begin:end], within, strict=True)
        ]
        lines = tuple(zip(steps[begin:end], within, may_write_all, strict=True))
        has_products = any(x.parts[0] == "wgmma" for x in within)
        found[begin] = Run(begin, end, lines, has_products)
    return found
