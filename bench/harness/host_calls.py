"""Calls of ops up to their first launch, timed in a process of its own.

Run by `bench.host` beside any checkout of the library, the one on `PYTHONPATH`: it imports nothing
else of the project. A line of input asks for a turn; the answer is a line of JSON, nanoseconds by
op.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import stlm_kernels
from stlm_kernels import _launch

try:
    from stlm_kernels import runtime
except ImportError:  # commits before there was one
    from stlm_kernels import _checks as runtime  # type: ignore[no-redef]

CALLS = 200
"""Calls of an op in a turn."""


def cases() -> dict[str, Callable[[], Any]]:
    """Return a call by op: as training makes it, or for decoding, without gradients."""
    bf16, boundaries = torch.bfloat16, torch.tensor([0, 100, 256], dtype=torch.int32)

    def states(*shape: int, trained: bool = True) -> torch.Tensor:
        return torch.randn(*shape, dtype=bf16).requires_grad_(trained)

    ids, table = torch.randint(256, (256,), dtype=torch.uint8), states(320, 128)
    q, k, v = states(256, 8, 32), states(256, 2, 32), states(256, 2, 32)
    rows, targets = states(256, 128), torch.randint(256, (256,))
    query, cache = states(4, 8, 64, trained=False), states(4, 64, 2, 64, trained=False)
    lengths = torch.full((4,), 9, dtype=torch.int32)
    return {
        "byte_pool": lambda: stlm_kernels.byte_pool(ids, table, boundaries, impl="triton"),
        "attention": lambda: stlm_kernels.attention(
            q, k, v, window=64, cu_seqlens=boundaries, impl="triton"
        ),
        "decode_attention": lambda: stlm_kernels.decode_attention(
            query, cache, cache, lengths, impl="triton"
        ),
        "linear_cross_entropy": lambda: stlm_kernels.linear_cross_entropy(
            rows, table, targets, valid_vocab=257, impl="triton"
        ),
    }


def turn(calls: dict[str, Callable[[], Any]]) -> dict[str, list[int]]:
    """Time each call from its beginning to its first launch, which reaches no device."""
    launched = 0

    def note(*launch: Any) -> None:
        nonlocal launched
        launched = launched or time.thread_time_ns()

    found: dict[str, list[int]] = {name: [] for name in calls}
    with _launch.recording(note):
        for name, call in calls.items():
            for _ in range(CALLS):
                launched = 0
                began = time.thread_time_ns()
                call()
                found[name].append(launched - began)
    return found


def main() -> None:
    torch.set_num_threads(1)
    # Tensors of a GPU have no values to look at.
    runtime.values_visible = lambda *tensors: False
    calls = cases()
    turn(calls)  # the first calls import and fill caches
    for _ in sys.stdin:
        print(json.dumps(turn(calls)), flush=True)
