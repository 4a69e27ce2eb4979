"""Loads, stores and asynchronous copies as steps of the state."""

from __future__ import annotations

import numpy as np

from .code import Step
from .elements import WORDS, as_rows, element, joined, split
from .operands import Decoder
from .parse import Address, Constant, Instruction, Operand, PtxError, Register, Symbol, Vector
from .registers import UNSIGNED, Array, Mask, bits_of, signed, unsigned
from .state import State


class Place:
    """The address of an operand, as a function of the state."""

    def __init__(self, decoder: Decoder, operand: Operand, space: str) -> None:
        assert isinstance(operand, Address)
        self.offset = operand.offset
        base = operand.base
        self.slot: int | None = None
        if isinstance(base, Symbol):
            self.offset += decoder.program.symbols[base.name]
        elif isinstance(base, Constant):
            self.offset += base.value
        else:
            self.slot = decoder.slots[base.name]
        self.space = space

    def of(self, state: State, threads: Array) -> Array:
        """Address for each of these threads, as int64."""
        if self.slot is None:
            return np.full(len(threads), self.offset, np.int64)
        base = state.of(self.slot, threads)
        if self.offset:
            # Of the width of the base: what was subtracted from it comes back with the offset.
            base = base + base.dtype.type(self.offset % (1 << 8 * base.itemsize))
        return base.astype(np.int64)


def space_of(parts: list[str]) -> str:
    """The memory that an instruction accesses.

    Raises:
        PtxError: it is not known here.
    """
    if {"async", "mbarrier", "bulk"} & set(parts) or "shared::cluster" in parts:
        raise PtxError(f"expected memory of the block itself, got {'.'.join(parts)}")
    spaces = [part.split("::")[0] for part in parts]
    found = [space for space in spaces if space in ("global", "shared", "param", "local", "const")]
    if len(found) != 1 or found[0] == "const":
        raise PtxError(f"expected global, shared, local or param memory, got {'.'.join(parts)}")
    return found[0]


def items(operand: Operand) -> tuple[Operand, ...]:
    """Elements of a vector, or the one operand."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def load(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, source = instruction.operands[:2]
    parts = instruction.parts
    space, kind = space_of(parts), parts[-1]
    if space == "param":
        return _load_parameter(decoder, target, source, kind)
    bits = bits_of(kind)
    results = [decoder.destination(item) for item in items(target)]
    widths = [decoder.width(x) if isinstance(x, Register) else bits for x in items(target)]
    place = Place(decoder, source, space)
    extends = kind[0] == "s"

    width, count = bits // 8, len(results)
    targets = [
        (i, result, register_bits)
        for i, (result, register_bits) in enumerate(zip(results, widths, strict=True))
        if result is not None
    ]

    def step(state: State, mask: Mask) -> None:
        threads = state.active(mask)
        words = split(read(state, place, threads, width * count), width, count)
        for i, result, register_bits in targets:
            state.put(result, threads, _extended(words[i], register_bits, extends), mask)

    return step


def _extended(word: Array, bits: int, is_signed: bool) -> Array:
    if 8 * word.dtype.itemsize == bits:
        return word
    if is_signed:
        return unsigned(signed(word).astype(f"i{bits // 8}"))
    return word.astype(UNSIGNED[bits])


def read(state: State, place: Place, threads: Array, size: int) -> Array:
    """Elements of `size` bytes that these threads read."""
    report = state.reporter(threads)
    addresses = place.of(state, threads)
    if state.costs is not None:
        count_access(state, place.space, "load", addresses, size, threads)
    if place.space == "local":
        return state.local.read(addresses, size, threads, report)
    if place.space == "global":
        owners = state.of_threads(state.owner, threads)
        elements = state.memory.read(addresses, size, owners, report)
    else:
        elements = state.shared.read(addresses, size, threads, report)
    if state.progress.watching:
        state.progress.saw(threads, addresses, elements)
    return elements


def count_access(
    state: State, space: str, kind: str, addresses: Array, size: int, threads: Array
) -> None:
    """Add an access to the costs, where they are counted."""
    costs = state.costs
    if costs is None or not len(threads):
        return
    warps = state.warp_index[threads]
    if space == "global":
        costs.global_access(kind, addresses, size, warps)
    elif space == "local":
        costs.local_access(kind, addresses, size, state.thread[threads], warps)
    else:
        costs.shared_access(kind, addresses, size, warps)


def _load_parameter(decoder: Decoder, target: Operand, source: Operand, kind: str) -> Step:
    assert isinstance(source, Address)
    assert isinstance(source.base, Symbol)
    name, offset = source.base.name, source.offset
    result = decoder.destination(target)
    assert result is not None
    bits, width = bits_of(kind), decoder.width(target)

    def step(state: State, mask: Mask) -> None:
        raw = state.parameters[name][offset : offset + bits // 8]
        word = np.ascontiguousarray(raw).view(UNSIGNED[bits])
        state.set(result, _extended(word, width, kind[0] == "s"), mask)

    return step


def store(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, source = instruction.operands[:2]
    space, bits = space_of(instruction.parts), bits_of(instruction.parts[-1])
    slots = [decoder.slot(item, max(bits, 16)) for item in items(source)]
    place, dtype = Place(decoder, target, space), np.dtype(WORDS[bits // 8])

    def step(state: State, mask: Mask) -> None:
        threads = state.active(mask)
        words = [state.of(slot, threads).astype(dtype, copy=False) for slot in slots]
        write(state, place, threads, joined(words))

    return step


def write(state: State, place: Place, threads: Array, elements: Array) -> None:
    """Store elements of these threads."""
    report = state.reporter(threads)
    addresses, size = place.of(state, threads), elements.itemsize
    if state.costs is not None:
        count_access(state, place.space, "store", addresses, size, threads)
    if state.progress.watching and place.space != "local":
        state.progress.saw(threads, addresses, elements, writes=True)
    if place.space == "global":
        owners = state.of_threads(state.owner, threads)
        state.memory.write(addresses, elements, size, owners, report)
    elif place.space == "local":
        state.local.write(addresses, elements, size, threads, report)
    else:
        state.shared.write(addresses, elements, size, threads, report)


def copy(decoder: Decoder, instruction: Instruction) -> Step | None:
    """cp.async and its groups; bulk and tensor copies are not known here."""
    parts = instruction.parts
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        return None
    if parts[2] == "commit_group":
        return lambda state, mask: state.copies.commit(mask)
    if parts[2] == "wait_all":
        return lambda state, mask: state.copies.wait(mask, 0)
    if parts[2] == "wait_group":
        newest = instruction.operands[0]
        assert isinstance(newest, Constant)
        return lambda state, mask: state.copies.wait(mask, newest.value)
    target, source, size, *rest = instruction.operands
    assert isinstance(size, Constant)
    shared, distant = Place(decoder, target, "shared"), Place(decoder, source, "global")
    given = decoder.slot(rest[0], 32) if rest else None
    return _copy_step(shared, distant, size.value, given)


def _copy_step(shared: Place, distant: Place, size: int, given: int | None) -> Step:
    """Copies of `size` bytes, of which those from `given` on become zeros."""

    def step(state: State, mask: Mask) -> None:
        threads = state.active(mask)
        lengths = None if given is None else state.of(given, threads)
        if lengths is None or (lengths == size).all():
            elements = read(state, distant, threads, size)
        else:
            elements = np.zeros(len(threads), element(size))
            for length in np.unique(lengths):
                chosen = np.flatnonzero(lengths == length)
                if length == size:
                    elements[chosen] = read(state, distant, threads[chosen], size)
                else:
                    for i in range(int(length)):
                        byte = read(state, Shifted(distant, i), threads[chosen], 1)
                        as_rows(elements, size)[chosen, i] = byte
        state.copies.issue(threads, shared.of(state, threads), elements)

    return step


class Shifted(Place):
    """A place some bytes on."""

    def __init__(self, place: Place, distance: int) -> None:
        self.slot, self.space = place.slot, place.space
        self.offset = place.offset + distance
