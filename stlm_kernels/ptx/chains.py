"""The longest chain of instructions of which each needs the one before."""

from __future__ import annotations

from .code import Code

STORES = ("st", "cp", "stmatrix", "atom", "red")
LOADS = ("ld", "ldmatrix", "wgmma", "atom")


class Chains:
    """Length of the chain that ends in each register, over threads that run in step.

    A load counts as needing every store before it: which store made what it reads is not followed.
    """

    def __init__(self, code: Code) -> None:
        self.reads, self.writes = code.reads, code.writes
        names = [instruction.parts[0] for instruction in code.program.instructions]
        in_parameters = [".param" in x.opcode for x in code.program.instructions]
        self.stores = [name in STORES for name in names]
        self.loads = [
            name in LOADS and not inside for name, inside in zip(names, in_parameters, strict=True)
        ]
        self.lengths: dict[int, int] = {}
        self.stored = 0
        self.longest = 0

    def note(self, index: int) -> None:
        """An instruction was executed."""
        lengths = self.lengths
        length = max((lengths.get(slot, 0) for slot in self.reads[index]), default=0)
        if self.loads[index]:
            length = max(length, self.stored)
        length += 1
        for slot in self.writes[index]:
            lengths[slot] = length
        if self.stores[index]:
            self.stored = max(self.stored, length)
        self.longest = max(self.longest, length)
