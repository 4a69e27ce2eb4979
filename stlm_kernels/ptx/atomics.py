"""Atomics on global or shared memory (`atom`, `red`), as if one thread came after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .accesses import Place, count_access, items, space_of
from .code import Step
from .formats import flushed, packed, unpacked
from .operands import Decoder
from .parse import Instruction
from .registers import Array, Mask, bits_of, signed, single, unsigned
from .state import State

Combination = Callable[[Array, Array], Array]
"""Bits to store, from those that are there and those that come."""

_INTEGERS = ("b32", "u32", "s32", "b64", "u64", "s64")
_WHOLE = {
    "min": np.minimum, "max": np.maximum, "add": np.add,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_KINDS = {
    **dict.fromkeys(("min", "max", "add", "and", "or", "xor"), _INTEGERS),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
}
"""Kinds of each operation beside the additions of floats."""
LARGEST = 128
"""Bits of the largest access."""


def _flushed_sum(a: Array, b: Array) -> Array:
    """Sum of fp32 numbers, whose subnormals an atomic on global memory takes for zeros."""
    return flushed(flushed(a) + flushed(b))


def _combination(name: str, kind: str, space: str) -> Combination | None:
    """The function of an operation on one element; None where it is not known here."""
    if kind in _KINDS.get(name, ()):
        if name in ("exch", "cas"):
            return lambda old, new: new
        whole = _WHOLE[name]
        if kind[0] == "s":
            return lambda old, new: unsigned(whole(signed(old), signed(new)))
        return whole
    if name != "add":
        return None
    if kind in ("f32", "f64"):
        add = _flushed_sum if (kind, space) == ("f32", "global") else np.add
        return lambda old, new: unsigned(np.asarray(add(single(old), single(new))))
    if kind in ("f16", "bf16"):
        return unpacked(kind, np.add)
    return packed(kind[:-2], np.add) if kind in ("f16x2", "bf16x2") else None


def atomic(decoder: Decoder, instruction: Instruction) -> Step | None:
    """An atomic with or without a result; elements of a vector are atomic each for itself."""
    parts = instruction.parts
    operands = instruction.operands if parts[0] == "atom" else (None, *instruction.operands)
    target, source, *values = operands
    if "L2::cache_hint" in parts:
        values = values[:-1]
    space, kind = space_of(parts), parts[-1]
    names = [part for part in parts[1:] if part in _KINDS]
    if source is None or space not in ("global", "shared") or len(names) != 1:
        return None
    name = names[0]
    combine = _combination(name, kind, space)
    is_small_sum = name == "add" and "f16" in kind
    if combine is None or ("noftz" in parts) != is_small_sum:
        return None
    if len(values) != (2 if name == "cas" else 1):
        return None
    bits = bits_of(kind)
    if any(len(items(value)) * bits > LARGEST for value in values if value is not None):
        return None
    slots = [[decoder.slot(x, bits) for x in items(value)] for value in values if value is not None]
    results = [] if target is None else [decoder.destination(x) for x in items(target)]
    place = Place(decoder, source, space)

    def step(state: State, mask: Mask) -> None:
        threads = state.active(mask)
        given = [[state.of(slot, threads) for slot in each] for each in slots]
        expected = given[0][0] if name == "cas" else None
        before = _carried_out(state, place, threads, combine, given[-1], expected)
        for result, word in zip(results, before, strict=False):
            if result is not None:
                state.put(result, threads, word, mask)

    return step


def _carried_out(
    state: State,
    place: Place,
    threads: Array,
    combine: Combination,
    values: list[Array],
    expected: Array | None,
) -> list[Array]:
    """Carry out an atomic for each thread, in their order; the values that were there before.

    Args:
        values: of each element of the vector.
        expected: where it is given, it must stand there for anything to change (`cas`).
    """
    addresses = place.of(state, threads)
    dtype: Any = values[0].dtype
    before = [np.zeros(len(threads), dtype) for _ in values]
    width, changes = dtype.itemsize, False
    size = width * len(values)
    count_access(state, place.space, "atomic", addresses, size, threads)
    for data, offsets, chosen in _parts(state, place, addresses, threads, size):
        words = data[: len(data) // width * width].view(dtype)
        for turn in _in_turn(offsets):
            at, ours = offsets[turn] // width, chosen[turn]
            for element, value in enumerate(values):
                old = words[at + element]
                new = combine(old, value[ours])
                if expected is not None:
                    new = np.where(old == expected[ours], new, old)
                before[element][ours] = old
                words[at + element] = new
                changes |= bool((new != old).any())
    if state.progress.watching:
        state.progress.saw(threads, addresses, *before, *values)
        if changes:
            state.progress.changed()
    return before


def _in_turn(places: Array) -> Iterator[Array]:
    """Positions whose places all differ: the first access to each, then the second, ..."""
    order = np.argsort(places, kind="stable")
    begins = np.flatnonzero(np.diff(places[order], prepend=-1))
    lengths = np.diff(begins, append=len(places))
    turns = np.arange(len(places)) - np.repeat(begins, lengths)
    by_turn = order[np.argsort(turns, kind="stable")]
    yield from np.split(by_turn, np.cumsum(np.bincount(turns))[:-1])


def _parts(
    state: State, place: Place, addresses: Array, threads: Array, size: int
) -> Iterator[tuple[Array, Array, Array]]:
    """Bytes of a memory, offsets in them, and which of the accesses these are."""
    report = state.reporter(threads)
    if place.space == "shared":
        offsets = state.shared.atomic(addresses, size, threads, report)
        yield state.shared.data, offsets, np.arange(len(threads))
        return
    for allocation, chosen in state.memory.atomic(addresses, size, report):
        yield allocation.data, addresses[chosen] - allocation.base, chosen
