"""Batches of blocks in turn: one that waits for what a later one stores is put off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .machine import Machine

MOST_AT_ONCE = 8
"""Batches that are kept in memory though they could go on."""
MOST_IDLE_ROUNDS = 8192
"""Rounds in which nothing new happens, after which nothing is expected to."""
FINGERPRINTS = 64
"""Idle rounds after which it is looked for a state that all batches have been in before."""


def run_in_turn(machines: Iterable[Machine]) -> None:
    """Execute each batch until it ends or waits, then those that wait until all have ended.

    Where nothing can go on, the launch ends there with a fault of the kind "deadlock".

    Raises:
        Fault: unless the collector keeps it.
    """
    waiting: dict[Machine, Iterator[bool]] = {}
    for machine in machines:
        run = machine.run()
        outcome = next(run, None)
        while outcome and len(waiting) >= MOST_AT_ONCE:
            outcome = next(run, None)
        if outcome is not None:
            waiting[machine] = run
    idle = 0
    states: set[tuple[int, ...]] = set()
    while waiting:
        advanced = _round(waiting)
        idle = 0 if advanced else idle + 1
        if advanced:
            states.clear()
        elif idle <= FINGERPRINTS:
            state = tuple(machine.fingerprint() for machine in waiting)
            if state in states:
                break
            states.add(state)
        elif idle > MOST_IDLE_ROUNDS:
            break
    for machine in waiting:
        machine.add_counts()
    if waiting:
        next(iter(waiting)).report_deadlock()


def _round(waiting: dict[Machine, Iterator[bool]]) -> bool:
    """Resume each batch once; return whether any changed something or ended."""
    advanced = False
    for machine, run in list(waiting.items()):
        outcome = next(run, None)
        if outcome is None:
            del waiting[machine]
        advanced |= outcome is not False
    return advanced
