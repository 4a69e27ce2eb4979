"""Warps that wait for what others store: found, so that those others run first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lanes import LANES
from .registers import Array, Mask
from .threads import Threads

PERIOD = 256
"""Straight runs from one beginning of the watch to the next: to watch all of them costs time."""
WINDOW = 32
"""Straight runs that are watched at least."""
POLLS = 4
"""Times that a batch looks for itself before another has its turn."""
SLICE = 1 << 13
"""Straight runs after which another batch has its turn, if this one looks at what it knows too."""
MOST_KEPT = 1 << 16
"""Accesses that are remembered."""


class Progress:
    """Warps of a batch that repeat accesses made before, and change nothing.

    An access is known where the same threads saw or stored the same values at the same addresses
    by the same instruction. A loop that waits has no others; one that works reads or writes
    something new sooner or later. A warp that may only do this last loses time, never its turn.

    Args:
        threads: the batch.
    """

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self.watching = False
        self.waits = np.zeros(threads.n // LANES, bool)
        self.advanced = False  # something new since it was last asked
        self.last_look = threads.current, 0
        self.is_over = False  # its slice
        self._turns = self._ends = self._polls = 0
        self._known: set[int] = set()
        self._looks = False  # at what it knows, in this slice
        self._any_known = self._any_new = self._any_change = False

    def turn(self) -> None:
        """A straight run begins."""
        self._turns += 1
        if not self.watching and self._turns % PERIOD:  # a slice is whole periods
            return
        if self._turns % SLICE == 0:
            self.is_over, self._looks = self._looks, False
        if self.watching and self._turns > self._ends and not self.waits.any():
            self.watching = False
            self._known.clear()
        elif self._turns % PERIOD == 0:
            self.watching, self._ends = True, self._turns + WINDOW

    def saw(self, threads: Array, *values: Array, writes: bool = False) -> None:
        """Note an access: its addresses and what was seen or stored there."""
        if not len(threads):
            return
        instruction = self.threads.current
        parts = (threads, *values)
        access = hash((instruction.line, *(np.ascontiguousarray(x).tobytes() for x in parts)))
        if access in self._known:
            self._any_known, self.last_look = True, (instruction, int(threads[0]))
            return
        if len(self._known) > MOST_KEPT:
            self._known.clear()
        self._known.add(access)
        self._any_new = True
        self._any_change |= writes

    def changed(self) -> None:
        """Note that an access changed memory, though it may be known."""
        self._any_new = self._any_change = True

    def end_of_run(self, mask: Mask) -> None:
        """Judge the warps that ran: those that saw nothing but what they knew wait."""
        if self._any_new or self._any_known:
            warps = slice(None) if mask is None else mask.reshape(-1, LANES).any(1)
            self.waits[warps] = not self._any_new
        if self._any_change:
            self.waits[:] = False
        self.advanced |= self._any_new
        self._looks |= self._any_known
        self._polls = 0 if self._any_new else self._polls
        self._any_known = self._any_new = self._any_change = False

    def able(self, runnable: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Threads of these whose warps do not wait."""
        if not self.watching:
            return runnable
        return runnable & ~np.repeat(self.waits, LANES)

    def pauses(self, any_able: bool) -> bool:
        """Return whether it is another batch's turn; where no thread is able, all look again."""
        if not any_able:
            self.waits[:] = False
            self._ends = self._turns + WINDOW
            self._polls += 1
            return self._polls % POLLS == 0
        return self.is_over

    def take_advanced(self) -> bool:
        """Return whether anything new was seen or stored since the last call; begin a slice."""
        advanced, self.advanced, self.is_over = self.advanced, False, False
        return advanced


def fingerprint(*arrays: Array) -> Any:
    """A number for the contents of arrays."""
    return hash(tuple(hash(x.tobytes()) for x in arrays))
