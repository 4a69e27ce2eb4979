"""Operands of instructions as slots of the register file, while a program is decoded."""

from __future__ import annotations

import numpy as np

from .parse import Constant, Operand, Program, PtxError, Register, Symbol
from .registers import UNSIGNED, Array


class Decoder:
    """Slots of registers and constants, while a program is decoded."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots = {name: i for i, name in enumerate(program.registers)}
        self.constants: list[tuple[int, Array]] = []
        self._known: dict[tuple[int, int], int] = {}

    def slot(self, operand: Operand, bits: int) -> int:
        """Slot that holds an operand: its register, or a constant of `bits`."""
        if isinstance(operand, Register):
            return self.slots[operand.name]
        if isinstance(operand, Constant):
            return self.constant(operand.value, bits)
        if isinstance(operand, Symbol) and operand.name in self.program.symbols:
            return self.constant(self.program.symbols[operand.name], bits)
        raise PtxError(f"{self.program.name}: expected a register or a number, got {operand}")

    def constant(self, value: int, bits: int) -> int:
        key = (value % (1 << bits), bits)
        if key not in self._known:
            dtype = bool if bits == 1 else UNSIGNED[bits]
            self._known[key] = len(self.slots) + len(self.constants)
            self.constants.append((self._known[key], np.array([key[0]], dtype)))
        return self._known[key]

    def destination(self, operand: Operand) -> int | None:
        """Slot of a result; None for the sink `_`."""
        if isinstance(operand, Register):
            return self.slots[operand.name]
        return None

    def width(self, operand: Operand) -> int:
        assert isinstance(operand, Register), operand
        return self.program.registers[operand.name]
