"""What the C library does with memory that a step frees: the next step needs it again."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for its next tensors on a CPU.

    By default glibc gives large tensors back to the system, and maps them anew page by page: a
    quarter of the time of a training step whose tensors pass 32 MiB, and an unsteady part of any
    time. It holds for all of the process from now on, whose memory stays near its peak. Without
    glibc nothing happens.

    Source: the GNU C library's manual, "Malloc Tunable Parameters".
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
