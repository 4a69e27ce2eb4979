"""Loads, stores, asynchronous copies and atomics as steps of the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .code import Step
from .elements import WORDS, as_rows, element, joined, split
from .operands import Decoder
from .parse import Address, Constant, Instruction, Operand, PtxError, Register, Symbol, Vector
from .registers import UNSIGNED, Array, Mask, bits_of, signed, single, unsigned
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


def _space(parts: list[str]) -> str:
    if {"async", "mbarrier", "bulk"} & set(parts) or "shared::cluster" in parts:
        raise PtxError(f"expected memory of the block itself, got {'.'.join(parts)}")
    spaces = [part.split("::")[0] for part in parts]
    found = [space for space in spaces if space in ("global", "shared", "param", "local", "const")]
    if len(found) != 1 or found[0] == "const":
        raise PtxError(f"expected global, shared, local or param memory, got {'.'.join(parts)}")
    return found[0]


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def load(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, source = instruction.operands[:2]
    parts = instruction.parts
    space, kind = _space(parts), parts[-1]
    if space == "param":
        return _load_parameter(decoder, target, source, kind)
    bits = bits_of(kind)
    results = [decoder.destination(item) for item in _items(target)]
    widths = [decoder.width(x) if isinstance(x, Register) else bits for x in _items(target)]
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
    if place.space == "global":
        owners = state.of_threads(state.owner, threads)
        return state.memory.read(addresses, size, owners, report)
    if place.space == "local":
        return state.local.read(addresses, size, threads, report)
    return state.shared.read(addresses, size, threads, report)


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
    space, bits = _space(instruction.parts), bits_of(instruction.parts[-1])
    slots = [decoder.slot(item, max(bits, 16)) for item in _items(source)]
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


def atomic(decoder: Decoder, instruction: Instruction) -> Step | None:
    """atom and red on global or shared memory, one thread after the other."""
    parts = instruction.parts
    returns = parts[0] == "atom"
    operands = instruction.operands if returns else (None, *instruction.operands)
    target, source, *values = operands
    kind = parts[-1]
    names = [part for part in parts if part in _ATOMICS or part == "cas"]
    space = _space(parts)
    if (
        space not in ("global", "shared")
        or len(names) != 1
        or kind not in ("b32", "u32", "s32", "u64", "s64", "b64", "f32", "f64")
    ):
        return None
    bits = bits_of(kind)
    slots = [decoder.slot(value, bits) for value in values if value is not None]
    result = None if target is None else decoder.destination(target)
    assert source is not None
    place = Place(decoder, source, space)

    def step(state: State, mask: Mask) -> None:
        threads = state.active(mask)
        before = _in_turn(
            state, place, threads, names[0], kind, [state.of(s, threads) for s in slots]
        )
        if result is not None:
            state.put(result, threads, before, mask)

    return step


_ATOMICS: dict[str, Any] = {
    "add": lambda a, b: a + b, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda a, b: b,
}  # fmt: skip


def _in_turn(
    state: State, place: Place, threads: Array, name: str, kind: str, values: list[Array]
) -> Array:
    """Carry out an atomic for each thread; the values that were there before."""
    addresses = place.of(state, threads)
    dtype: Any = UNSIGNED[bits_of(kind)]
    before = np.zeros(len(threads), dtype)
    as_number: Any = {"f": single, "s": signed}.get(kind[0], lambda x: x)
    size = dtype().itemsize
    for data, offsets, chosen in _atomic_parts(state, place, addresses, threads, size):
        words = data[: len(data) // size * size].view(dtype)
        for offset, i in zip(offsets, chosen, strict=True):
            place_in = offset // size
            old = words[place_in : place_in + 1]
            before[i] = old[0]
            if name == "cas":
                new = values[1][i : i + 1] if old[0] == values[0][i] else old.copy()
            else:
                new = unsigned(
                    np.asarray(_ATOMICS[name](as_number(old), as_number(values[0][i : i + 1])))
                )
            words[place_in] = new[0]
    return before


def _atomic_parts(
    state: State, place: Place, addresses: Array, threads: Array, size: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Bytes of a memory, offsets in them, and which of the accesses these are."""
    report = state.reporter(threads)
    if place.space == "shared":
        offsets = state.shared.atomic(addresses, size, threads, report)
        yield state.shared.data, offsets, np.arange(len(threads))
        return
    for allocation, chosen in state.memory.atomic(addresses, report, size):
        yield allocation.data, addresses[chosen] - allocation.base, chosen
