"""Programs made ready to run: registers as slots, each instruction as a function of the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import accesses, atomics, carry, collective
from .arithmetic import function_of
from .code import Code, Step
from .operands import Decoder
from .packs import Operation, Operations
from .parse import (
    CARRY,
    Address,
    Constant,
    Instruction,
    Operand,
    Program,
    PtxError,
    Register,
    Symbol,
    Vector,
)
from .registers import UNSIGNED, Array, Mask, bits_of
from .runs import own_results, runs_of
from .state import State

IGNORED = ("prefetch", "discard", "griddepcontrol", "membar", "fence", "nanosleep", "setmaxnreg")
"""Instructions that change no value. A fence of the asynchronous proxy is one with a meaning."""


def decode(program: Program) -> Code:
    """Decode once for any number of launches. Unknown instructions fail when they are reached."""
    decoder = Decoder(program)
    instructions = program.instructions
    found = ((index, _flow_of(program, x)) for index, x in enumerate(instructions))
    flow = {index: kind for index, kind in found if kind is not None}
    steps = [
        _nothing if index in flow else _line(decoder, instruction)
        for index, instruction in enumerate(instructions)
    ]
    touched = [_touched(decoder, instruction) for instruction in instructions]
    reads, writes = ([pair[i] for pair in touched] for i in (0, 1))
    own = own_results(program, flow, reads, writes)
    runs = runs_of(program, flow, steps, own, reads, writes, dict(decoder.constants))
    return Code(program, runs, flow, decoder.slots, decoder.constants, reads, writes)


def _flow_of(program: Program, instruction: Instruction) -> tuple[str, int] | None:
    name, *modifiers = instruction.parts
    if name == "bra":
        target = instruction.operands[0]
        assert isinstance(target, Symbol)
        return "bra", program.labels[target.name]
    if name in ("ret", "exit"):
        return "ret", 0
    if name in ("bar", "barrier") and "sync" in modifiers and "warp" not in modifiers:
        if len(instruction.operands) == 1:
            return "bar", 0
        count = instruction.operands[1]
        if isinstance(count, Constant) and count.value == program.threads:
            return "bar", 0
    return None


def _line(decoder: Decoder, instruction: Instruction) -> Step:
    """Return what an instruction does where its predicate is on."""
    step = _step(decoder, instruction)
    if step is None:
        return _unknown(decoder.program, instruction)
    if instruction.predicate is None:
        return step
    slot, negated = decoder.slots[instruction.predicate], instruction.negated

    def where_on(state: State, mask: Mask) -> None:
        chosen = state.where_on(slot, negated, mask)
        if chosen is not state.no_thread:
            step(state, chosen)

    return where_on


def _unknown(program: Program, instruction: Instruction) -> Step:
    def step(state: State, mask: Mask) -> None:
        source = instruction.source or "no source line"
        raise PtxError(
            f"{program.name}: {instruction.opcode} is not known here"
            f" ({source}, PTX line {instruction.line}: {instruction.text})"
        )

    return step


def _step(decoder: Decoder, instruction: Instruction) -> Step | None:
    """Return what an instruction does; None where it is not known here."""
    name = instruction.parts[0]
    try:
        if name in carry.TAKES or "cc" in instruction.parts:
            return carry.step_of(decoder, instruction)
        maker = _MAKERS.get(name)
        if maker is not None:
            return maker(decoder, instruction)
        if name in IGNORED:
            return _nothing
        return _arithmetic(decoder, instruction)
    except (PtxError, KeyError, ValueError, AssertionError):
        return None


def _nothing(state: State, mask: Mask) -> None:
    pass


def _arithmetic(decoder: Decoder, instruction: Instruction) -> Step | None:
    function = function_of(instruction.opcode)
    if function is None:
        return None
    target, *sources = instruction.operands
    widths = _source_widths(instruction)
    slots = tuple(decoder.slot(source, bits) for source, bits in zip(sources, widths, strict=True))
    result = decoder.destination(target)
    if result is None:
        return None
    bits = decoder.width(target)
    if instruction.parts[0] == "cvt":
        function = _extending(function, _extends(instruction), bits)
    fixed = [x.value for x in sources if isinstance(x, Constant)]
    key = instruction.opcode, *(fixed if instruction.parts[0] in BY_CONSTANTS else ())
    return Operation(key, function, slots, result, _kind_of(bits))


BY_CONSTANTS = ("shl", "shr", "shf", "lop3", "prmt", "bfe", "bfi")
"""Functions that are computed in another way for each constant."""


def _kind_of(bits: int) -> np.dtype[Any]:
    return np.dtype(bool if bits == 1 else UNSIGNED[bits])


def _extends(instruction: Instruction) -> bool:
    return instruction.parts[-2][0] == "s"


def _extending(function: Callable[..., Array], is_signed: bool, bits: int) -> Callable[..., Array]:
    """cvt into a register that may be wider than the type: signed results are extended."""

    def extended(*operands: Array) -> Array:
        value = function(*operands)
        if 8 * value.dtype.itemsize == bits:
            return value
        if is_signed:
            value = value.view(f"i{value.dtype.itemsize}").astype(f"i{bits // 8}")
        return value.astype(UNSIGNED[bits])

    return extended


def _source_widths(instruction: Instruction) -> list[int]:
    """Bits of each source, for its constants."""
    name, *modifiers = instruction.parts
    count = len(instruction.operands) - 1
    bits = bits_of(modifiers[-1])
    if modifiers[-2:-1] == ["f32"] and name != "cvt":  # 16-bit floats and a sum in fp32
        return [bits] * (count - 1) + [32]
    if name == "cvt" and count == 2:
        return [32, 32]
    if name == "cvt":  # a narrow type may come in a wider register
        return [max(bits, 16)]
    if name in ("shl", "shr"):
        return [bits, 32]
    if name in ("bfe", "bfi", "shf"):
        return [bits] * (count - 2) + [32, 32] if name != "shf" else [32, 32, 32]
    if name == "selp":
        return [bits, bits, 1]
    if name == "setp":
        return [bits, bits] + [1] * (count - 2)
    if name in ("mul", "mad") and modifiers[0] == "wide":
        return [bits, bits] + [2 * bits] * (count - 2)
    return [bits] * count


def _move(decoder: Decoder, instruction: Instruction) -> Step | None:
    """mov: also of special registers, of addresses, and between a register and its parts."""
    target, source = instruction.operands
    bits = bits_of(instruction.parts[-1])
    if isinstance(source, Vector):
        return _packing(decoder, target, source, bits)
    if isinstance(target, Vector):
        return _unpacking(decoder, target, source, bits)
    result = decoder.destination(target)
    assert result is not None
    if isinstance(source, Symbol) and source.name.startswith("%"):
        return _special(source.name, result)
    return _copied(decoder.slot(source, bits), result)


def _copied(slot: int, result: int) -> Step:
    def step(state: State, mask: Mask) -> None:
        values = state.values
        value = values[slot]
        values[result] = value if mask is None else np.where(mask, value, values[result])

    return step


def _special(name: str, result: int) -> Step:
    def step(state: State, mask: Mask) -> None:
        if name not in state.special:
            raise PtxError(f"{state.program.name}: {name} is not known here")
        state.set(result, state.special[name], mask)

    return step


def _packing(decoder: Decoder, target: Operand, source: Vector, bits: int) -> Step:
    part = bits // len(source.items)
    slots = tuple(decoder.slot(item, part) for item in source.items)
    result = decoder.destination(target)
    assert result is not None
    dtype = UNSIGNED[bits]

    def together(*parts: Array) -> Array:
        value = parts[0].astype(dtype)
        for i, x in enumerate(parts[1:], 1):
            value = value | (x.astype(dtype) << dtype(part * i))
        return value

    return Operation(("pack", bits, len(slots)), together, slots, result, np.dtype(dtype))


def _unpacking(decoder: Decoder, target: Vector, source: Operand, bits: int) -> Step:
    part = bits // len(target.items)
    slot = decoder.slot(source, bits)
    results = [decoder.destination(item) for item in target.items]
    narrow = UNSIGNED[part]

    def part_of(i: int) -> Callable[[Array], Array]:
        if not i:
            return lambda value: value.astype(narrow)
        return lambda value: (value >> value.dtype.type(part * i)).astype(narrow)

    return Operations(
        Operation(("unpack", bits, part, i), part_of(i), (slot,), result, np.dtype(narrow))
        for i, result in enumerate(results)
        if result is not None
    )


def _set_predicate(decoder: Decoder, instruction: Instruction) -> Step | None:
    """setp: two destinations are a predicate and its negation, or one for each half of an x2."""
    target, *sources = instruction.operands
    if not isinstance(target, Vector):
        return _arithmetic(decoder, instruction)
    by_halves = instruction.opcode.endswith("x2")
    function = function_of(instruction.opcode.removesuffix("x2"))
    if function is None or len(sources) != 2:
        return None
    slots = [
        decoder.slot(x, bits) for x, bits in zip(sources, _source_widths(instruction), strict=True)
    ]
    results = [decoder.destination(item) for item in target.items]

    def step(state: State, mask: Mask) -> None:
        operands = [state.values[slot] for slot in slots]
        if by_halves:
            low, high = ([half(x, i) for x in operands] for i in (0, 1))
            outcomes = function(*low), function(*high)
        else:
            value = function(*operands)
            outcomes = value, ~value
        for result, outcome in zip(results, outcomes, strict=True):
            if result is not None:
                state.set(result, outcome, mask)

    return step


def half(x: Array, which: int) -> Array:
    """The low (0) or high (1) 16 bits of 32."""
    return (x >> np.uint32(16 * which)).astype(np.uint16)


def _convert_address(decoder: Decoder, instruction: Instruction) -> Step | None:
    """cvta: global addresses are the same in both spaces; shared ones have no such form here."""
    if "shared" in instruction.parts:
        return None
    target, source = instruction.operands
    result, slot = decoder.destination(target), decoder.slot(source, 64)
    assert result is not None
    return _copied(slot, result)


WITHOUT_RESULT = ("st", "stmatrix", "red", "bra", "bar", "cp", "fence", "ret")


def _touched(decoder: Decoder, instruction: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Slots of the registers that an instruction reads and of those that it writes."""
    operands = instruction.operands
    has_result = bool(operands) and instruction.parts[0] not in WITHOUT_RESULT
    results, sources = operands[:has_result], operands[has_result:]
    reads = [decoder.slots[name] for operand in sources for name in _names(operand)]
    if instruction.predicate is not None:
        reads.append(decoder.slots[instruction.predicate])
    writes = [decoder.slots[name] for x in results for name in _names(x)]
    if instruction.parts[0] in carry.TAKES:
        reads.append(decoder.slots[CARRY])
    if "cc" in instruction.parts:
        writes.append(decoder.slots[CARRY])
    return tuple(reads), tuple(writes)


def _names(operand: Operand) -> Iterator[str]:
    """Registers of an operand."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _names(item)
    elif isinstance(operand, Address):
        yield from _names(operand.base)


def _cache_policy(decoder: Decoder, instruction: Instruction) -> Step | None:
    """createpolicy: of caches, which hold nothing here."""
    result = decoder.destination(instruction.operands[0])
    assert result is not None
    return lambda state, mask: state.set(result, np.zeros(1, np.uint64), mask)


_MAKERS: dict[str, Callable[[Decoder, Instruction], Step | None]] = {
    "mov": _move,
    "setp": _set_predicate,
    "cvta": _convert_address,
    "createpolicy": _cache_policy,
    "ld": accesses.load,
    "ldu": accesses.load,
    "st": accesses.store,
    "cp": accesses.copy,
    "atom": atomics.atomic,
    "red": atomics.atomic,
    "shfl": collective.shuffle,
    "redux": collective.reduce,
    "vote": collective.vote,
    "elect": collective.elect,
    "activemask": collective.active_mask,
    "bar": collective.warp_barrier,
    "ldmatrix": collective.load_matrix,
    "stmatrix": collective.store_matrix,
    "mma": collective.multiply,
    "wgmma": collective.multiply_asynchronously,
    "fence": collective.fence,
}
