"""PTX text as data: parameters, registers, shared memory, instructions with their source lines.

The grammar is that of the PTX ISA as triton's NVPTX backend and its inline assembly write it: one
entry function, scopes with registers of their own, `.loc` lines that name the Python source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CARRY = "CC.CF"
"""The register of the carry, which no operand names."""
WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64, "128": 128}


class PtxError(ValueError):
    """PTX that cannot be executed here: the message names the instruction and the source line."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Constant:
    """An integer, or a float by its bits (`bits` wide)."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a variable or a special register."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Constant
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


Operand = Register | Constant | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        opcode: with all modifiers, such as "ld.global.v4.b32".
        operands: destination first, as written.
        predicate: register that switches it on; `negated` where it is written `@!`.
        line: of the PTX text, from 1.
        source: "file.py:12" of the Python source, or "".
        text: as written.
    """

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    line: int
    source: str
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "u64", "u32", "f32", ...


@dataclass
class Program:
    """A kernel.

    Args:
        registers: name -> bits.
        labels: name -> index of the instruction that follows.
        symbols: name -> offset in shared or local memory, or address of a variable of the module.
        shared_bytes, local_bytes: of a block, without the dynamic part, and of a thread.
        variables: bytes of each variable of the module, which lie in global memory.
    """

    name: str
    parameters: list[Parameter]
    threads: int
    registers: dict[str, int] = field(default_factory=lambda: {CARRY: 1})
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    variables: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


ALIGNMENT = 128
"""Variables of a module begin at lines of memory."""
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_VARIABLE = re.compile(
    r"\.(shared|local|global)\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s+([\w$]+)(?:\[(\d*)\])?"
    r"\s*(?:=\s*([^;]*))?;"
)
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_PREDICATE = re.compile(r"@(!?)(%?[\w$]+)\s+")
_LABEL = re.compile(r"([\w$]+):")


def parse(text: str) -> Program:
    """Read a PTX module that holds one kernel.

    Raises:
        PtxError: there is no entry function, or more than one, or a statement of another form.
    """
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"ptx: expected one entry function, got {len(entries)}")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    if threads is None:
        raise PtxError(f"{name}: expected .reqntid or .maxntid, got neither")
    program = Program(name, _parameters(parameters), int(threads[1]))
    _declare_variables(program, text[: entries[0].start()])
    begin = entries[0].end()
    first_line = text.count("\n", 0, begin) + 1
    files = {int(number): path.rsplit("/", 1)[-1] for number, path in _FILE.findall(text)}
    _Body(program, files).read(text[begin:], first_line)
    return program


def _parameters(text: str) -> list[Parameter]:
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(item)
        if match is None:
            raise PtxError(f"ptx: expected a scalar or pointer parameter, got {item!r}")
        found.append(Parameter(match[2], match[1]))
    return found


def _declare_variables(program: Program, text: str) -> None:
    for found in _VARIABLE.finditer(text):
        space, align, bits, name, count, initial = found.groups()
        width = int(bits) // 8
        # `name[]` is the dynamic part: it is last, and its size comes from the launch.
        size = width * (int(count or 0) if count is not None else 1)
        if space == "global":
            program.variables[name] = _initialised(size, width, initial or "")
            program.symbols[name] = program.variables[name].ctypes.data
            continue
        step, used = int(align or width), f"{space}_bytes"
        offset = -(-getattr(program, used) // step) * step
        program.symbols[name] = offset
        setattr(program, used, offset + size)


def _initialised(size: int, width: int, initial: str) -> NDArray[np.uint8]:
    """Memory of a variable of the module, from the line it begins in."""
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    variable = memory[begin : begin + size]
    numbers = [_constant(item).value for item in _split(initial.strip("{} "))]
    for i, number in enumerate(numbers):
        raw = (number % (1 << 8 * width)).to_bytes(width, "little")
        variable[i * width : (i + 1) * width] = np.frombuffer(raw, np.uint8)
    return variable


class _Body:
    """Reader of the statements between the braces of a kernel."""

    def __init__(self, program: Program, files: dict[int, str]) -> None:
        self.program, self.files = program, files
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""

    def read(self, text: str, first_line: int) -> None:
        for statement, line in self._statements(text, first_line):
            self._read_statement(statement, line)
            if not self.scopes:
                return

    def _statements(self, text: str, first_line: int) -> Iterator[tuple[str, int]]:
        """Statements without comments; braces of scopes, labels and `.loc` lines by themselves."""
        pending, began = "", first_line
        for line, raw in enumerate(text.split("\n"), first_line):
            rest = raw.split("//")[0].strip()
            if _LOC.match(rest):
                yield rest, line
                continue
            while rest:
                if not pending:
                    began = line
                    if rest[0] in "{}":
                        yield rest[0], line
                        rest = rest[1:].strip()
                        continue
                    label = _LABEL.match(rest)
                    if label:
                        yield label[0], line
                        rest = rest[label.end() :].strip()
                        continue
                head, semicolon, rest = rest.partition(";")
                pending = f"{pending} {head}".strip()
                rest = rest.strip()
                if semicolon:
                    yield pending, began
                    pending = ""

    def _read_statement(self, statement: str, line: int) -> None:
        if statement == "{":
            self.scopes.append({})
        elif statement == "}":
            self.scopes.pop()
        elif match := _LOC.match(statement):
            if int(match[2]):  # line 0 belongs to no source line
                self.source = f"{self.files.get(int(match[1]), '?')}:{match[2]}"
        elif statement.endswith(":"):
            self.program.labels[statement[:-1]] = len(self.program.instructions)
        elif statement.startswith(".reg"):
            self._declare_registers(statement, line)
        elif _VARIABLE.fullmatch(statement + ";"):
            _declare_variables(self.program, statement + ";")
        elif statement.startswith(".pragma"):
            pass
        elif statement.startswith("."):
            raise PtxError(f"ptx line {line}: expected an instruction, got {statement!r}")
        else:
            self.program.instructions.append(self._instruction(statement, line))

    def _declare_registers(self, statement: str, line: int) -> None:
        match = _REG.fullmatch(statement)
        bits = WIDTHS.get(re.sub(r"^[a-z]+(?=\d)", "", match[1])) if match else None
        if match is None or bits is None:
            raise PtxError(f"ptx line {line}: expected a register declaration, got {statement!r}")
        for item in match[2].split(","):
            counted = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", item)
            if counted:
                names = [f"{counted[1]}{i}" for i in range(int(counted[2]))]
            else:
                names = [item.strip()]
            for name in names:
                # Inline assembly may declare a name again in a scope of its own.
                unique = name if name not in self.program.registers else f"{name}@{line}"
                self.scopes[-1][name] = unique
                self.program.registers[unique] = bits

    def _instruction(self, statement: str, line: int) -> Instruction:
        text, predicate, negated = statement, None, False
        match = _PREDICATE.match(statement)
        if match:
            negated, predicate = bool(match[1]), self._register_name(match[2])
            statement = statement[match.end() :]
        opcode, _, rest = statement.partition(" ")
        if "\t" in opcode:
            opcode, _, rest = statement.partition("\t")
        operands = tuple(self._operand(item, line) for item in _split(rest))
        return Instruction(opcode.strip(), operands, predicate, negated, line, self.source, text)

    def _register_name(self, name: str) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _operand(self, text: str, line: int) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(item, line) for item in _split(text[1:-1])))
        if text[0] == "[":
            base, sign, offset = re.fullmatch(
                r"\[\s*([^\s+\]-]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text
            ).groups()  # type: ignore[union-attr]
            distance = int(offset, 0) * (-1 if sign == "-" else 1) if sign else 0
            inner = self._operand(base, line)
            assert isinstance(inner, Register | Symbol | Constant)
            return Address(inner, distance)
        if "|" in text:  # a second destination
            return Vector(tuple(self._operand(item, line) for item in text.split("|")))
        if text[0] in "-0123456789":
            return _constant(text)
        name = self._register_name(text)
        return Symbol(text) if name is None else Register(name)


def _constant(text: str) -> Constant:
    if text[:2] in ("0f", "0F"):
        return Constant(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Constant(int(text[2:], 16), 64)
    if "." in text:
        return Constant(int(np.float64(text).view(np.uint64)), 64)
    return Constant(int(text.rstrip("U"), 0))


def _split(text: str) -> list[str]:
    """Operands between commas, those in braces and brackets whole."""
    items, depth, item = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            items.append(item.strip())
            item = ""
        else:
            item += character
    return [*items, item.strip()] if item.strip() else items
