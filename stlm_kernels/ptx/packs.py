"""Packs: instructions of a straight run that compute the same function, as one call of numpy.

Triton unrolls a tensor over the registers of a thread, so that a run holds the same function many
times. A call costs more than what it does to a few hundred threads, so those that do not need each
other are computed side by side, the threads of one instruction after those of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import numpy as np

from .code import Step
from .registers import Array, Mask
from .state import State

Function = Callable[..., Array]
THREADS_AT_ONCE = 16384
"""Threads of all operations of a call: more leave the caches."""
LEAST = 3
"""Operations of a pack: fewer cost less one by one."""


@dataclass(frozen=True)
class Operation:
    """A function of registers and constants without any other effect, as a step of the state.

    Args:
        key: what operations of the same function share, constants with a shape of their own too.
        function: takes arrays of register bits, an element for each thread or one for all.
        sources: slots of its operands.
        result: slot of its result.
        kind: type of the result.
        of_warps: it reads other lanes, so that whole warps must take part.
    """

    key: Hashable
    function: Function
    sources: tuple[int, ...]
    result: int
    kind: np.dtype[np.generic]
    of_warps: bool = False

    def __call__(self, state: State, mask: Mask) -> None:
        if self.of_warps:
            state.require_whole_warps(mask)
        values, result, sources = state.values, self.result, self.sources
        if len(sources) == 2:  # as most have
            first, second = sources
            value = self.function(values[first], values[second])
        else:
            value = self.function(*[values[slot] for slot in sources])
        if value.dtype is not self.kind:
            value = value.astype(self.kind)
        values[result] = value if mask is None else np.where(mask, value, values[result])


class Operations(tuple[Operation, ...]):
    """Operations of one instruction, none of which changes what another reads."""

    def __call__(self, state: State, mask: Mask) -> None:
        for operation in self:
            operation(state, mask)


class Pack:
    """Several operations of one function that do not need each other."""

    def __init__(self, operations: Sequence[Operation], constants: Mapping[int, Array]) -> None:
        first = operations[0]
        self.operations, self.constants = operations, constants
        self.count, self.function, self.kind = len(operations), first.function, first.kind
        self.of_warps = first.of_warps
        columns = zip(*(x.sources for x in operations), strict=True)
        self.operands = [_operand(column, constants) for column in columns]
        self.results = [x.result for x in operations]
        self._halves: list[Step] = []

    def __call__(self, state: State, mask: Mask) -> None:
        count, values, threads = self.count, state.values, state.n
        if count * threads > THREADS_AT_ONCE:
            for half in self.halves():
                half(state, mask)
            return
        if self.of_warps:
            state.require_whole_warps(mask)
        value = self.function(*[operand(values, threads) for operand in self.operands])
        if value.dtype is not self.kind:
            value = value.astype(self.kind)
        # Where all operands are the same for all, so is the result.
        rows = [value] * count if len(value) == 1 else value.reshape(count, threads)
        if mask is None:
            for slot, row in zip(self.results, rows, strict=True):
                values[slot] = row
        else:
            for slot, row in zip(self.results, rows, strict=True):
                values[slot] = np.where(mask, row, values[slot])

    def halves(self) -> list[Step]:
        """Two packs of half as many operations."""
        if not self._halves:
            middle = self.count // 2
            parts = self.operations[:middle], self.operations[middle:]
            self._halves = [packed(part, self.constants) for part in parts]
        return self._halves


def packed(operations: Sequence[Operation], constants: Mapping[int, Array]) -> Step:
    """Operations of one key as a step."""
    return operations[0] if len(operations) == 1 else Pack(operations, constants)


Operand = Callable[[list[Array], int], Array]


def _operand(slots: tuple[int, ...], constants: Mapping[int, Array]) -> Operand:
    """One operand of all operations of a pack, from the registers and the number of threads.

    It has an element for each thread of each operation, or one for all of them.
    """
    count, is_same = len(slots), len(set(slots)) == 1
    if is_same:
        return partial(_repeated, slot=slots[0], count=count)
    if constants.keys() >= set(slots):
        column = np.concatenate([constants[slot] for slot in slots])
        return lambda values, threads: column.repeat(threads)
    get = itemgetter(*slots)

    def several(values: list[Array], threads: int) -> Array:
        arrays = get(values)
        whole = np.concatenate(arrays)
        if len(whole) == count * threads:
            return whole
        if len(whole) == count:  # one for all threads
            return whole.repeat(threads)
        return np.concatenate([x.repeat(threads) if len(x) == 1 else x for x in arrays])

    return several


def _repeated(values: list[Array], threads: int, slot: int, count: int) -> Array:
    value = values[slot]
    return value if len(value) == 1 else np.concatenate([value] * count)


def levels(
    indices: range,
    reads: Sequence[tuple[int, ...]],
    writes: Sequence[tuple[int, ...]],
    is_ordered: Callable[[int], bool],
) -> dict[int, int]:
    """How many instructions of a run each has before it that it needs.

    Args:
        indices: of the run.
        reads, writes: slots of each instruction.
        is_ordered: it has an effect beyond registers, so that it stays behind those before it,
            maybe on the same level.
    """
    found: dict[int, int] = {}
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    last = 0
    for index in indices:
        level = 0
        for slot in reads[index]:
            level = max(level, written.get(slot, -1) + 1)
        for slot in writes[index]:
            level = max(level, written.get(slot, -1) + 1, read.get(slot, -1) + 1)
        if is_ordered(index):
            level = last = max(level, last)
        for slot in reads[index]:
            read[slot] = max(level, read.get(slot, -1))
        for slot in writes[index]:
            written[slot] = level
        found[index] = level
    return found


def packs_of(
    places: Mapping[int, int],
    steps: Sequence[Step],
    is_own: Sequence[bool],
    constants: Mapping[int, Array],
) -> list[tuple[Step, tuple[int, ...]]]:
    """Return the steps of a run with the indices of their instructions, level by level.

    Args:
        places: level of each instruction, see `levels`.
        steps, is_own: of all instructions; results that others read are packed apart.
        constants: by slot.
    """
    packs: dict[Hashable, list[Operation]] = {}
    indices: dict[Hashable, list[int]] = {}
    alone: dict[Hashable, Step] = {}
    for index, level in places.items():
        step = steps[index]
        if isinstance(step, Operation | Operations):
            for operation in [step] if isinstance(step, Operation) else step:
                key: Hashable = (level, operation.key, is_own[index])
                packs.setdefault(key, []).append(operation)
                indices.setdefault(key, []).append(index)
        else:
            alone[index], indices[index] = step, [index]
    order = sorted(indices, key=lambda key: (places[indices[key][0]], indices[key][0]))
    found: list[tuple[Step, tuple[int, ...]]] = []
    for key in order:
        if key in alone:
            found.append((alone[key], tuple(indices[key])))
        elif len(packs[key]) >= LEAST:
            found.append((Pack(packs[key], constants), tuple(indices[key])))
        else:
            found += [(x, (i,)) for x, i in zip(packs[key], indices[key], strict=True)]
    return found
