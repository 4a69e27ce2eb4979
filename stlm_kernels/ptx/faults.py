"""Faults that a check found in a kernel's execution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .parse import Instruction

KINDS = (
    "outside",  # an access outside every tensor, or outside shared or local memory
    "misaligned",  # a vector or word that does not begin at a multiple of its size
    "unwritten",  # a read of memory that nothing wrote
    "race",  # two warps, or two blocks, touch the same bytes without an order between them
    "lanes",  # lanes of a warp store different values to one address by one instruction
    "barrier",  # a barrier or warp-wide instruction that not all its threads reach
    "async",  # an asynchronous copy or product whose result is used before its wait
    "deadlock",  # threads that wait for a store which no thread makes
    "proxy",  # generic writes read by the asynchronous proxy without a fence
)


@dataclass(frozen=True)
class Place:
    """A thread of a block, as its indices."""

    block: int
    thread: int


class Fault(Exception):
    """A fault of a kernel, with where it happened.

    Args:
        kind: one of `KINDS`.
        kernel: its name.
        instruction: that was executed.
        place: the first thread that shows it; None where it is of a whole block.
        detail: what was wrong.
    """

    def __init__(
        self, kind: str, kernel: str, instruction: Instruction, place: Place | None, detail: str
    ) -> None:
        self.kind, self.kernel, self.instruction = kind, kernel, instruction
        self.place, self.detail = place, detail
        where = f"block {place.block}, thread {place.thread}: " if place else ""
        source = instruction.source or "no source line"
        line = f"PTX line {instruction.line} ({instruction.text})"
        super().__init__(f"{kind}: {kernel}, {source}, {line}: {where}{detail}")


class Reporter(Protocol):
    """Says that the threads at these positions of an access show a fault."""

    def __call__(self, kind: str, wrong: Any, detail: str) -> None: ...


class Collector:
    """Raises faults, or keeps the first of each kind and source line for those told to."""

    def __init__(self, collects: frozenset[str] = frozenset()) -> None:
        unknown = collects - set(KINDS)
        if unknown:
            raise ValueError(f"collect: expected kinds of {KINDS}, got {sorted(unknown)}")
        self.collects = collects
        self.found: dict[tuple[str, str, str], Fault] = {}

    def report(self, fault: Fault) -> None:
        if fault.kind not in self.collects:
            raise fault
        self.found.setdefault((fault.kind, fault.kernel, fault.instruction.source), fault)
