"""Straight runs of a program: the instructions that threads execute in a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from .code import Run, Step
from .packs import levels, packs_of
from .parse import Instruction, Program
from .registers import Array

FOR_ACTIVE = (
    "ld", "ldu", "atom", "shfl", "redux", "vote", "elect", "activemask", "ldmatrix", "mma", "wgmma",
)  # fmt: skip
"""Instructions whose result depends on which threads are active, or that only those may execute."""
EFFECTS = (
    "ld", "ldu", "st", "cp", "atom", "red", "ldmatrix", "stmatrix", "wgmma", "bar", "barrier",
    "fence", "membar",
)  # fmt: skip
"""Instructions that reach beyond registers, or wait: they stay in order."""


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
    program: Program,
    flow: Mapping[int, tuple[str, int]],
    steps: Sequence[Step],
    own: Sequence[bool],
    reads: Sequence[tuple[int, ...]],
    writes: Sequence[tuple[int, ...]],
    constants: Mapping[int, Array],
) -> dict[int, Run]:
    """Return the straight runs by the index where they begin."""
    instructions = program.instructions
    names = [instruction.parts[0] for instruction in instructions]
    may_write_all = [
        is_own and name not in FOR_ACTIVE for is_own, name in zip(own, names, strict=True)
    ]
    needs = _with_products(names, reads, writes)
    begins = _begins(program, flow)
    found = {}
    for begin, following in zip(begins, [*begins[1:], len(instructions)], strict=True):
        end = following - 1 if following - 1 in flow and following > begin else following
        places = levels(range(begin, end), *needs, lambda index: _is_ordered(instructions[index]))
        lines = tuple(
            (step, instructions[indices[0]], may_write_all[indices[0]], indices)
            for step, indices in packs_of(places, steps, may_write_all, constants)
        )
        then = flow.get(end, ("next", end))
        found[begin] = Run(begin, end, lines, "wgmma" in names[begin:end], then)
    return found


def _is_ordered(instruction: Instruction) -> bool:
    return instruction.parts[0] in EFFECTS and "param" not in instruction.parts


PRODUCTS = -1
"""In place of a slot: what products that are on their way sum into."""


def _with_products(
    names: Sequence[str], reads: Sequence[tuple[int, ...]], writes: Sequence[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Slots that instructions read and write, so that sums of products stay between their waits."""
    sums = {
        slot for name, slots in zip(names, writes, strict=True) if name == "wgmma" for slot in slots
    }
    touching = [bool(sums.intersection(a + b)) for a, b in zip(reads, writes, strict=True)]
    return (
        [(*slots, PRODUCTS) if x else slots for slots, x in zip(reads, touching, strict=True)],
        [
            (*slots, PRODUCTS) if name == "wgmma" else slots
            for slots, name in zip(writes, names, strict=True)
        ],
    )
