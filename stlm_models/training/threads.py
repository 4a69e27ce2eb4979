"""The number of threads that training computes with, chosen by the times of its own steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

CLEARLY_FASTER = 0.85
"""Fewer threads stay where their trial took at most this share of the step before it."""
SLOWED = 1.4
"""A step that takes so many times the step before it asks for a trial at once."""
SHORTEST_WAIT, LONGEST_WAIT = 4, 64
"""Steps between trials: doubled after each that changed nothing."""


class ThreadCount:
    """Number of threads that torch uses, tried anew when training steps slow down.

    The threads of a product or an elementwise loop wait for the slowest of them. Where another
    process takes a core, the thread there is off the core for milliseconds at a time and all others
    wait, at each of thousands of loops a step; one thread fewer does not wait. So after a step that
    was slow, and now and then anyway, one step runs with another number: somewhat fewer threads,
    which stay where that step was clearly faster, or again all of them, which stay where it was not
    slower. Sums may round otherwise with another number of threads.

    Args:
        most: threads on a quiet machine; None is what torch chose.
        set_threads: sets them.
    """

    def __init__(
        self, most: int | None = None, set_threads: Callable[[int], None] = torch.set_num_threads
    ) -> None:
        self.most = torch.get_num_threads() if most is None else most
        self.count = self.most
        self._set_threads = set_threads
        self._trial: int | None = None
        self._last: float | None = None
        self._wait = self._patience = SHORTEST_WAIT
        self._goes_down = True

    def after_step(self, seconds: float) -> str | None:
        """Take note of a training step; a line for the user where the number of threads changed."""
        if self._trial is not None:
            return self._judge_trial(seconds)
        if self._last is not None and seconds > SLOWED * self._last:
            self._wait, self._patience, self._goes_down = 0, SHORTEST_WAIT, True
        self._last = seconds
        self._wait -= 1
        if self._wait < 0:
            self._begin_trial()
        return None

    def close(self) -> None:
        """Give torch the threads that it had."""
        self._set_threads(self.most)

    def _begin_trial(self) -> None:
        fewer = max(1, self.count - max(1, self.count // 8))
        first, second = (fewer, self.most) if self._goes_down else (self.most, fewer)
        wanted = second if first == self.count else first
        self._goes_down = not self._goes_down
        if wanted != self.count:
            self._trial = wanted
            self._set_threads(wanted)

    def _judge_trial(self, seconds: float) -> str | None:
        assert self._trial is not None
        assert self._last is not None
        tried, before, usual = self._trial, self.count, self._last
        self._trial = None
        if seconds > usual * (CLEARLY_FASTER if tried < before else 1):
            self._set_threads(before)
            self._patience = min(2 * self._patience, LONGEST_WAIT)
            self._wait = self._patience
            return None
        self.count, self._last = tried, seconds
        self._wait = self._patience = SHORTEST_WAIT
        self._goes_down = tried < before  # on in the direction that helped
        return (
            f"threads: {tried} instead of {before}: a step took {seconds:.2f} s after"
            f" {usual:.2f} s (--threads N fixes the number)"
        )
