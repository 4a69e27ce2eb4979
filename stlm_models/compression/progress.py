"""Progress of the coding of a file."""

from __future__ import annotations

import time

from ..training.progress import ProgressLine

CODER_EXTRA = ("safetensors", "tqdm")
"""Packages that the commands need beside the library's own."""


class FileProgress:
    """Shows how many bytes of a file are done, and how fast."""

    def __init__(self, length: int) -> None:
        self.length, self.seconds = length, 0.0
        self._line, self._began = ProgressLine(), time.monotonic()

    def __call__(self, done: int) -> None:
        speed = done / (time.monotonic() - self._began + 1e-9)
        self._line.update(done / self.length, f"{done:,} bytes, {speed:,.0f} bytes/s")

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self._line.close()
