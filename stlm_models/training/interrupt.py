"""Ctrl-C as a request, so that a run ends between two steps."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request that is met between two steps."""

    def __init__(self) -> None:
        self._requested = False

    def requested(self) -> bool:
        return self._requested

    def __enter__(self) -> Interrupt:
        self._previous = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
