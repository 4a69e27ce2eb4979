"""One implementation of one op, as the benchmarks see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stlm_kernels.spec import Case, Inputs


@dataclass(frozen=True)
class Entry:
    """One implementation of one op.

    Args:
        name: what tables and test names call it.
        function: takes the converted inputs as keyword arguments; returns what the op returns.
        convert: makes those from the op's own inputs, outside the timing.
        unsupported: why it cannot run a case, or None.
        ours: held to the library's tolerance rule; peers may be less exact.
        compiled: run through torch.compile.
        loose_gradients: why its gradients rightly differ from ours; recorded, not asserted.
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
def lengths_of(borders: Tensor) -> list[int]:
    """Rows of each document; on a GPU it waits, so layers that share the tensor ask once."""
    lengths: list[int] = borders.diff().tolist()
    return lengths
