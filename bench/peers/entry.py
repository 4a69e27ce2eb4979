"""Entries of the benchmarks: one implementation of one op each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stlm_kernels.spec import Case, Inputs


@dataclass(frozen=True)
class Entry:
    """Implementation of one op.

    Args:
        name: the name in tables and tests.
        function: takes the converted inputs as keyword arguments; returns what the op returns.
        convert: makes those from the op's own inputs, outside the timing.
        unsupported: returns the reason why it cannot run a case, or None.
        ours: held to the library's tolerance rule; peers may be less exact.
        compiled: run through torch.compile.
        loose_gradients: why its gradients rightly differ from ours; measured, not asserted.
    """

    name: str
    function: Callable[..., Any]
    convert: Callable[[Inputs], Inputs] = dict
    unsupported: Callable[[Case], str | None] = lambda case: None
    ours: bool = False
    compiled: bool = False
    loose_gradients: str = ""


def compiled(peer: Entry) -> Entry:
    return replace(peer, name=f"compiled {peer.name}", compiled=True)


@functools.lru_cache(maxsize=16)
def lengths_of(boundaries: Tensor) -> list[int]:
    """Return the length of each document; cached, since a GPU must wait for it."""
    lengths: list[int] = boundaries.diff().tolist()
    return lengths
