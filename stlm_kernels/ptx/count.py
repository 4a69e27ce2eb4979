"""Costs of an execution, counted under the names that Nsight Compute gives the same quantities.

Counts are exact for the PTX that ran. Instructions here are PTX's, not the machine's; memory
requests, sectors and wavefronts do not depend on that, except where the assembler merges or drops
accesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SECTOR = 32
BANKS, BANK_BYTES = 32, 4
LANES, NOTHING = 32, -1
LINE = 128  # bytes that shared memory and the L1 move in a cycle
KINDS = ("load", "store", "copy", "atomic")
"""Accesses; a copy is asynchronous. Of an atomic whose result is not used the machine makes a
reduction, which Nsight Compute counts apart."""

_REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_"
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_"
_WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_"
NAMES = {
    "instructions": "smsp__inst_executed.sum",
    "global_load_requests": f"{_REQUESTS}ld.sum",
    "global_store_requests": f"{_REQUESTS}st.sum",
    "global_copy_requests": f"{_REQUESTS}ldgsts.sum",
    "global_atomic_requests": f"{_REQUESTS}atom.sum",
    "global_load_sectors": f"{_SECTORS}ld.sum",
    "global_store_sectors": f"{_SECTORS}st.sum",
    "global_copy_sectors": f"{_SECTORS}ldgsts.sum",
    "global_atomic_sectors": f"{_SECTORS}atom.sum",
    **{
        f"local_{kind}_{what}": f"l1tex__t_{what}_pipe_lsu_mem_local_op_{short}.sum"
        for kind, short in (("load", "ld"), ("store", "st"))
        for what in ("requests", "sectors")
    },
    "shared_load_requests": "smsp__inst_executed_op_shared_ld.sum",
    "shared_store_requests": "smsp__inst_executed_op_shared_st.sum",
    "shared_load_wavefronts": f"{_WAVEFRONTS}ld.sum",
    "shared_store_wavefronts": f"{_WAVEFRONTS}st.sum",
    "class_mufu": "smsp__inst_executed_pipe_xu.sum",
    "class_branch": "smsp__inst_executed_op_branch.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "dram_bytes": "dram__bytes.sum",
}
"""Names of the counts that Nsight Compute has too."""

CONFLICTS = {
    f"shared_{kind}_conflicts": f"l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{short}.sum"
    for kind, short in (("load", "ld"), ("store", "st"))
}


def nsight(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts under the names that Nsight Compute gives them."""
    names = {**NAMES, **CONFLICTS}
    return {names[name]: x for name, x in counts.items() if name in names}


@dataclass
class Costs:
    """Counts of a launch; `counts` by name, see `NAMES` and the methods."""

    counts: Counter[str] = field(default_factory=Counter)
    read_sectors: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    written_sectors: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    longest_chain: int = 0

    def add(self, **values: float) -> None:
        """Add to the counts of these names."""
        self.counts.update(values)

    def global_access(self, kind: str, addresses: Array, size: int, warps: Array) -> None:
        """A request of each warp: the 32-byte sectors it touches, and the fewest that could do.

        Args:
            kind: one of `KINDS`.
            addresses: of each active thread, aligned to `size` bytes.
            warps: the warp of each.
        """
        sectors = int(_distinct(_by_warp(addresses // SECTOR, warps)).sum())
        useful = _distinct(_by_warp(addresses // size, warps)).sum(1) * size
        self.add(
            **{
                f"global_{kind}_requests": len(useful),
                f"global_{kind}_sectors": sectors,
                f"global_{kind}_ideal_sectors": int((-(-useful // SECTOR)).sum()),
                f"global_{kind}_cycles": int((-(-useful // LINE)).sum()),
            },
        )

    def local_access(
        self, kind: str, offsets: Array, size: int, lanes: Array, warps: Array
    ) -> None:
        """A request of each warp to local memory, where words of its lanes lie side by side.

        Args:
            kind: "load" or "store".
            offsets: in the memory of each active thread, whose index in its block is in `lanes`.
        """
        words = (offsets[:, None] + np.arange(0, max(size, BANK_BYTES), BANK_BYTES)) // BANK_BYTES
        places = (words * LANES + lanes[:, None] % LANES) * BANK_BYTES // SECTOR
        by_warp = np.concatenate([_by_warp(column, warps) for column in places.T], 1)
        self.add(
            **{
                f"local_{kind}_requests": len(by_warp),
                f"local_{kind}_sectors": int(_distinct(by_warp).sum()),
            },
        )

    def shared_access(self, kind: str, offsets: Array, size: int, warps: Array) -> None:
        """Wavefronts of each warp: passes over the 32 banks, and the fewest that could do.

        Accesses of 8 bytes are served by half warps, of 16 by quarters, each in a pass of its own.
        """
        at_once = min(LANES, LINE // size)
        words = (offsets[:, None] + np.arange(0, max(size, BANK_BYTES), BANK_BYTES)) // BANK_BYTES
        by_warp = np.stack([_by_warp(column, warps) for column in words.T], 2)
        groups = by_warp.reshape(len(by_warp) * (LANES // at_once), -1)
        distinct = _distinct(groups)
        bank = groups % BANKS + BANKS * np.arange(len(groups))[:, None]
        passes = np.bincount(bank[distinct], minlength=BANKS * len(groups)).reshape(-1, BANKS)
        wavefronts, ideal = int(passes.max(1).sum()), int((-(-passes.sum(1) // BANKS)).sum())
        self.add(
            **{
                f"shared_{kind}_requests": len(by_warp),
                f"shared_{kind}_wavefronts": wavefronts,
                f"shared_{kind}_ideal_wavefronts": ideal,
                f"shared_{kind}_conflicts": wavefronts - ideal,
            },
        )

    def touch(self, start: int, offsets: Array, size: int, extent: int, writes: bool) -> None:
        """Note the sectors of a storage: each is moved from or to DRAM once at least."""
        table = self.written_sectors if writes else self.read_sectors
        if start not in table:
            table[start] = np.zeros(-(-extent // SECTOR), bool)
        flags = table[start]
        flags[offsets // SECTOR] = True
        flags[np.minimum((offsets + size - 1) // SECTOR, len(flags) - 1)] = True

    def dram_bytes(self, factor: float = 1.0) -> float:
        """The fewest bytes between DRAM and L2: each touched sector once in each direction.

        Args:
            factor: blocks of the grid over those that ran. What blocks share is touched by few of
                them already, so no storage counts for more than it has.
        """
        tables = (*self.read_sectors.values(), *self.written_sectors.values())
        return SECTOR * sum(min(float(flags.sum()) * factor, len(flags)) for flags in tables)

    @property
    def l2_bytes(self) -> int:
        """Bytes of all sectors requested: what crosses the L2 where the L1 keeps nothing."""
        return SECTOR * int(sum(self.counts[f"global_{kind}_sectors"] for kind in KINDS))


def _by_warp(values: Array, warps: Array) -> Array:
    """Values of threads in order of their warps as (warps, 32), each followed by `NOTHING`."""
    starts = np.flatnonzero(np.diff(warps, prepend=-1))
    if len(values) == LANES * len(starts):
        return values.reshape(-1, LANES)
    counts = np.diff(starts, append=len(warps))
    rows = np.full((len(starts), LANES), NOTHING, np.int64)
    rows[np.arange(LANES) < counts[:, None]] = values
    return rows


def _distinct(rows: Array) -> Array:
    """Mark values of sorted rows that are the first of their kind; rows are sorted in passing."""
    rows.sort(1)
    first = np.ones(rows.shape, bool)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=first[:, 1:])
    first &= rows != NOTHING
    return first


CLASSES = {
    "mufu": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "div"),
    "matrix": ("mma", "wgmma", "ldmatrix", "stmatrix"),
    "memory": ("ld", "st", "cp", "atom", "red"),
    "lanes": ("shfl", "redux", "vote", "elect"),
    "barrier": ("bar", "barrier", "fence"),
    "branch": ("bra", "ret", "exit"),
    "convert": ("cvt",),
    "move": ("mov", "selp", "cvta", "createpolicy"),
}
FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2"}


def class_of(opcode: str) -> str:
    """The class of a PTX instruction, as `CLASSES` has them; "float" or "integer" for the rest."""
    name, *modifiers = opcode.split(".")
    for kind, names in CLASSES.items():
        if name in names:
            return kind
    return "float" if modifiers and modifiers[-1] in FLOATS else "integer"
