"""Loads, stores, asynchronous copies and atomics as steps of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .memory import WORDS
from .parse import Address, Constant, Instruction, Operand, PtxError, Register, Symbol, Vector
from .registers import UNSIGNED, bits_of, signed, single, unsigned

if TYPE_CHECKING:
    from .code import Mask, Step
    from .decode import Decoder
    from .machine import Machine

Array = NDArray[Any]


class Place:
    """The address of an operand, as a function of the machine."""

    def __init__(self, decoder: Decoder, operand: Operand, space: str) -> None:
        assert isinstance(operand, Address)
        self.offset = operand.offset
        base = operand.base
        self.slot: int | None = None
        if isinstance(base, Symbol):
            self.offset += decoder.program.shared[base.name]
        elif isinstance(base, Constant):
            self.offset += base.value
        else:
            self.slot = decoder.slots[base.name]
        self.space = space

    def of(self, machine: Machine, threads: Array) -> Array:
        """Address for each of these threads, as int64."""
        if self.slot is None:
            return np.full(len(threads), self.offset, np.int64)
        return machine.of(self.slot, threads).astype(np.int64) + self.offset


def _space(parts: list[str]) -> str:
    if {"async", "mbarrier", "bulk"} & set(parts) or "shared::cluster" in parts:
        raise PtxError(f"expected memory of the block itself, got {'.'.join(parts)}")
    spaces = [part.split("::")[0] for part in parts]
    found = [space for space in spaces if space in ("global", "shared", "param", "local", "const")]
    if len(found) != 1 or found[0] in ("local", "const"):
        raise PtxError(f"expected global, shared or param memory, got {'.'.join(parts)}")
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

    def step(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        words = read(machine, place, threads, bits // 8, len(results))
        for result, word, width in zip(results, words, widths, strict=True):
            if result is not None:
                put(machine, result, threads, _extended(word, width, extends), mask)

    return step


def _extended(word: Array, bits: int, is_signed: bool) -> Array:
    if 8 * word.dtype.itemsize == bits:
        return word
    if is_signed:
        return unsigned(signed(word).astype(f"i{bits // 8}"))
    return word.astype(UNSIGNED[bits])


def read(machine: Machine, place: Place, threads: Array, width: int, count: int) -> list[Array]:
    """Words that these threads read."""
    report = machine.reporter(threads)
    addresses = place.of(machine, threads)
    block = machine.block[threads]
    count_access(machine, place.space, "load", addresses, width * count, threads)
    if place.space == "global":
        return machine.memory.read(
            addresses, width, count, machine.block_index[threads].astype(np.int32), report
        )
    return machine.shared.read(
        addresses, width, count, block, machine.warp[threads], machine.epoch[block], report
    )


def count_access(
    machine: Machine, space: str, kind: str, addresses: Array, size: int, threads: Array
) -> None:
    """Add an access to the costs, where they are counted."""
    costs = machine.counts.costs
    if costs is None or not len(threads):
        return
    warps = machine.warp_index[threads]
    if space == "global":
        costs.global_access(kind, addresses, size, warps)
    else:
        costs.shared_access(kind, addresses, size, warps)


def put(machine: Machine, slot: int, threads: Array, value: Array, mask: Mask) -> None:
    """Set a register of some threads to values given for those alone."""
    if mask is None:
        machine.values[slot] = value
        return
    whole = np.array(machine.whole(slot))
    if whole.dtype != value.dtype:
        whole = whole.astype(value.dtype)
    whole[threads] = value
    machine.values[slot] = whole


def _load_parameter(decoder: Decoder, target: Operand, source: Operand, kind: str) -> Step:
    assert isinstance(source, Address)
    assert isinstance(source.base, Symbol)
    name, offset = source.base.name, source.offset
    result = decoder.destination(target)
    assert result is not None
    bits, width = bits_of(kind), decoder.width(target)

    def step(machine: Machine, mask: Mask) -> None:
        raw = machine.parameters[name][offset : offset + bits // 8]
        word = np.ascontiguousarray(raw).view(UNSIGNED[bits])
        machine.set(result, _extended(word, width, kind[0] == "s"), mask)

    return step


def store(decoder: Decoder, instruction: Instruction) -> Step | None:
    target, source = instruction.operands[:2]
    space, bits = _space(instruction.parts), bits_of(instruction.parts[-1])
    slots = [decoder.slot(item, max(bits, 16)) for item in _items(source)]
    place = Place(decoder, target, space)

    def step(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        words = [machine.of(slot, threads).astype(WORDS[bits // 8]) for slot in slots]
        write(machine, place, threads, words)

    return step


def write(machine: Machine, place: Place, threads: Array, words: list[Array]) -> None:
    """Store words of these threads."""
    report = machine.reporter(threads)
    addresses = place.of(machine, threads)
    block = machine.block[threads]
    size = words[0].dtype.itemsize * len(words)
    count_access(machine, place.space, "store", addresses, size, threads)
    if place.space == "global":
        machine.memory.write(
            addresses, words, machine.block_index[threads].astype(np.int32), report
        )
        return
    machine.shared.write(
        addresses, words, block, machine.warp[threads], machine.epoch[block], report
    )


def copy(decoder: Decoder, instruction: Instruction) -> Step | None:
    """cp.async and its groups; bulk and tensor copies are not known here."""
    parts = instruction.parts
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        return None
    if parts[2] == "commit_group":
        return lambda machine, mask: machine.copies.commit(mask)
    if parts[2] == "wait_all":
        return lambda machine, mask: machine.copies.wait(mask, 0)
    if parts[2] == "wait_group":
        newest = instruction.operands[0]
        assert isinstance(newest, Constant)
        return lambda machine, mask: machine.copies.wait(mask, newest.value)
    target, source, size, *rest = instruction.operands
    assert isinstance(size, Constant)
    shared, distant = Place(decoder, target, "shared"), Place(decoder, source, "global")
    given = decoder.slot(rest[0], 32) if rest else None
    return _copy_step(shared, distant, size.value, given)


def _copy_step(shared: Place, distant: Place, size: int, given: int | None) -> Step:
    """Copies of `size` bytes, of which those from `given` on become zeros."""

    def step(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        data = np.zeros((len(threads), size), np.uint8)
        lengths = np.full(len(threads), size) if given is None else machine.of(given, threads)
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            if length == size:
                words = read(machine, distant, threads[chosen], min(size, 8), max(1, size // 8))
                data[chosen] = np.stack(words, 1).view(np.uint8)
            elif length:
                for i in range(int(length)):
                    byte = Shifted(distant, i)
                    data[chosen, i] = read(machine, byte, threads[chosen], 1, 1)[0]
        machine.copies.issue(threads, shared.of(machine, threads), data)

    return step


class Shifted(Place):
    """A place some bytes on."""

    def __init__(self, place: Place, distance: int) -> None:
        self.slot, self.space = place.slot, place.space
        self.offset = place.offset + distance


def atomic(decoder: Decoder, instruction: Instruction) -> Step | None:
    """atom and red on global memory, one thread after the other."""
    parts = instruction.parts
    returns = parts[0] == "atom"
    operands = instruction.operands if returns else (None, *instruction.operands)
    target, source, *values = operands
    kind = parts[-1]
    names = [part for part in parts if part in _ATOMICS or part == "cas"]
    if (
        _space(parts) != "global"
        or len(names) != 1
        or kind not in ("b32", "u32", "s32", "u64", "s64", "b64", "f32", "f64")
    ):
        return None
    bits = bits_of(kind)
    slots = [decoder.slot(value, bits) for value in values if value is not None]
    result = None if target is None else decoder.destination(target)
    assert source is not None
    place = Place(decoder, source, "global")

    def step(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        before = _in_turn(
            machine, place, threads, names[0], kind, [machine.of(s, threads) for s in slots]
        )
        if result is not None:
            put(machine, result, threads, before, mask)

    return step


_ATOMICS: dict[str, Any] = {
    "add": lambda a, b: a + b, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda a, b: b,
}  # fmt: skip


def _in_turn(
    machine: Machine, place: Place, threads: Array, name: str, kind: str, values: list[Array]
) -> Array:
    """Carry out an atomic for each thread; the values that were there before."""
    addresses = place.of(machine, threads)
    dtype: Any = UNSIGNED[bits_of(kind)]
    before = np.zeros(len(threads), dtype)
    as_number: Any = {"f": single, "s": signed}.get(kind[0], lambda x: x)
    parts = machine.memory.atomic(addresses, machine.reporter(threads), dtype().itemsize)
    for allocation, chosen in parts:
        words = allocation.data[: len(allocation.data) // dtype().itemsize * dtype().itemsize].view(
            dtype
        )
        for i in chosen:
            place_in = (addresses[i] - allocation.start) // dtype().itemsize
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
