"""Additions, subtractions and products that pass on a carry (`add.cc`, `madc.hi`, ...)."""

from __future__ import annotations

import numpy as np

from .arithmetic import Function, function_of
from .code import Step
from .operands import Decoder
from .parse import CARRY, Instruction
from .registers import Array, Mask
from .state import State

TAKES = ("addc", "subc", "madc")
"""Instructions that add the carry, or take it away."""
KINDS = ("u32", "s32", "u64", "s64")


def step_of(decoder: Decoder, instruction: Instruction) -> Step | None:
    """An instruction that reads or writes the carry, which every thread has for itself."""
    name, *modifiers = instruction.parts
    kind = modifiers[-1]
    width = int(kind[1:]) if kind in KINDS else 0
    operation = name.removesuffix("c")
    product = _product(modifiers) if operation == "mad" else None
    if not width or operation not in ("add", "sub", "mad"):
        return None
    if operation == "mad" and product is None:
        return None
    target, *sources = instruction.operands
    slots = [decoder.slot(source, width) for source in sources]
    result, carry = decoder.destination(target), decoder.slots[CARRY]
    takes, passes_on = name in TAKES, "cc" in modifiers
    assert result is not None
    combine = _difference if operation == "sub" else _sum

    def step(state: State, mask: Mask) -> None:
        values = [state.values[slot] for slot in slots]
        if product is not None:
            values = [product(*values[:2]), values[2]]
        a, b = values
        before = state.values[carry].astype(a.dtype) if takes else np.zeros(1, a.dtype)
        value, after = combine(a, b, before)
        state.set(result, value, mask)
        if passes_on:
            state.set(carry, after, mask)

    return step


def _product(modifiers: list[str]) -> Function | None:
    half = next((x for x in modifiers if x in ("lo", "hi")), None)
    return None if half is None else function_of(f"mul.{half}.{modifiers[-1]}")


def _sum(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    """a + b + carry, and whether it went beyond the width."""
    once = a + b
    twice = once + carry
    return twice, (once < a) | (twice < once)


def _difference(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    """a - b - borrow, and whether it went below zero."""
    once = a - b
    return once - borrow, (a < b) | (once < borrow)
