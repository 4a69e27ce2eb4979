"""Bounds of an op's pass: its compiled launches counted on a CPU, and what torch adds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from stlm_kernels.ptx.bounds import Device, bounds_of, bounds_of_torch_op, ratio
from stlm_kernels.ptx.reports import execute_case
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from ..peers import PEERS
from ..peers.entry import Entry
from ..peers.installed import on_gpu
from .inductor import compiled_here, inductor
from .results import Result

Record = dict[str, Any]
Key = tuple[str, str, str, str]
DTYPE = torch.bfloat16
COMMITTED = Path(__file__).parents[1] / "results/bounds-h200.json"
OURS, LIBRARY, COMPILED = "stlm", "Liger", "compiled"
MAKERS = (OURS, LIBRARY, COMPILED)
"""Beginnings of the names of those whose kernels are counted."""
LEFT_TO_OPERATORS = ("compiled EmbeddingBag", "compiled segment_reduce", "compiled SDPA")
"""Peers that torch.compile leaves to one operator of torch, of which only bytes are known."""
MOST_ACCESSES = {"sectors": 1.15, "wavefronts": 1.1}
"""Accesses of a kernel to global and shared memory over the fewest that could do: above that it is
either mended, or has its reason in `tests/helpers/accepted_accesses.py`."""
MOST_GROWTH = 1.03
"""Bound over that of the committed table, above which the table must be written anew."""


class Counted(Protocol):
    """A pass of a case; see `targets.Target`."""

    @property
    def op(self) -> str: ...
    @property
    def case(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def reach(self) -> float | None: ...


def measure(row: Counted, by: Entry, device: Device, arch: int, sample: int) -> Record:
    """Count a row's launches by one implementation, and add up the bounds of their limits."""
    spec = OPS[row.op]
    case = case_named(spec, row.case)
    with inductor(device, sample) if by.compiled else nullcontext():
        session = execute_case(
            spec, case, arch=arch, dtype=DTYPE, direction=row.direction, sample=sample,
            function=compiled_here(by.function) if by.compiled else by.function,
            convert=by.convert,
        )  # fmt: skip
    kernels = [bounds_of(done, device) for done in session.executions]
    others = [bounds_of_torch_op(op, device) for op in session.torch_ops]
    us: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    largest: defaultdict[str, float] = defaultdict(float)
    of_kernel: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for bounds in (*kernels, *others):
        us.update(bounds.us)
        counts.update({name: x for name, x in bounds.counts.items() if name != "longest_chain"})
        largest[bounds.kernel] += bounds.largest
    for bounds in kernels:
        of_kernel[bounds.kernel].update(bounds.counts)
    floor_bytes = sum(
        spec.bytes_moved(case, DTYPE, each)
        for each in (("fwd", "bwd") if row.direction == "both" else (row.direction,))
    )
    return {
        "op": row.op,
        "case": row.case,
        "pass": row.direction,
        "by": by.name,
        "reach": row.reach,
        "kernels": len(kernels),
        "torch_ops": len(others),
        "sampled_1_in": round(max((bounds.factor for bounds in kernels), default=1.0), 2),
        "us": {name: round(x, 3) for name, x in us.items()},
        "bound": round(sum(largest.values()), 3),
        "dram_floor": round(floor_bytes / (device.dram_tb_per_s * 1e6), 3),
        "longest_chain": max((int(x.counts["longest_chain"]) for x in kernels), default=0),
        "sectors": round(ratio(counts, "sectors"), 3),
        "wavefronts": round(ratio(counts, "wavefronts"), 3),
        "instructions": round(counts["instructions"]),
        "dram_bytes": round(counts["dram_bytes"]),
        "l2_bytes": round(counts["l2_bytes"]),
        "bound_of": {
            name: round(x, 3) for name, x in sorted(largest.items(), key=lambda item: -item[1])
        },
        "accesses_of": {
            name: {what: round(ratio(x, what), 3) for what in ("sectors", "wavefronts")}
            for name, x in of_kernel.items()
        },
        "faults": sorted({fault.kind for done in session.executions for fault in done.faults}),
    }


def entries(op: str, case: Case) -> list[Entry]:
    """Ours, then each library whose kernels triton compiles, where it is installed, and each
    composition that torch.compile makes kernels of."""
    ours = Entry(OURS, partial(OPS[op].op, impl="triton"), ours=True)
    peers = [peer for peer in PEERS.get(op, ()) if peer.name.startswith((LIBRARY, COMPILED))]
    return [ours, *(peer for peer in peers if _is_countable(peer, case))]


def _is_countable(peer: Entry, case: Case) -> bool:
    refused = peer.unsupported(case)
    if peer.compiled:
        return refused is None and peer.name not in LEFT_TO_OPERATORS
    return refused in (None, on_gpu(case))


def case_named(spec: OpSpec, name: str) -> Case:
    """The case of this name.

    Raises:
        ValueError: the op has none.
    """
    for case in spec.cases:
        if case.name == name:
            return case
    raise ValueError(f"{spec.name}: expected a case's name, got {name!r}")


def line(record: Record, earlier: Mapping[Key, Record]) -> str:
    """A row of the table."""
    limits = sorted(record["us"].items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {us:.1f}" for name, us in limits)
    reach = "" if record["reach"] is None else f" of {record['reach']:g}"
    before = earlier.get(key_of(record))
    change = "" if before is None else f"  {record['bound'] / before['bound']:.2f}x before"
    op, case, direction, by = key_of(record)
    return (
        f"{op} {case} {direction} {by:<8} {record['bound']:8.1f} us{reach}"
        f"  floor {record['dram_floor']:.1f}  ({shown})"
        f"  {record['kernels']}+{record['torch_ops']} launches, chain {record['longest_chain']},"
        f" sectors {record['sectors']:.2f}, wavefronts {record['wavefronts']:.2f},"
        f" 1 block in {record['sampled_1_in']:g}{change}"
    )


def key_of(record: Record) -> Key:
    return record["op"], record["case"], record["pass"], record["by"]


def exceeding(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    """The largest ratios above `MOST_ACCESSES`, by kernel and what is accessed.

    Rows that were counted before kernels were told apart stand for their op.
    """
    found: dict[tuple[str, str], float] = {}
    for record in records:
        whole = {record["op"]: {what: record[what] for what in MOST_ACCESSES}}
        for kernel, ratios in record.get("accesses_of", whole).items():
            for what, most in MOST_ACCESSES.items():
                if ratios[what] > most:
                    found[kernel, what] = max(ratios[what], found.get((kernel, what), 0.0))
    return found


def read(path: Path) -> dict[Key, Record]:
    """A table that this command wrote, by op, case, pass and implementation.

    Raises:
        ValueError: it holds something else.
    """
    found = Result.read(path)
    if "bounds_on" not in found.settings:
        raise ValueError(f"{path}: expected a table of bench.bounds, got {found.command}")
    return {key_of(x): x for x in found.rows}
