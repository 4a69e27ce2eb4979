"""Cases of ops executed and counted, as text and as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..spec import Case, Inputs, OpSpec
from ..spec_inputs import untouched_zeros, zeros_beyond
from .bounds import Bounds, Device, bounds_of, bounds_of_torch_op, ratio, requests, work_share
from .count import CONFLICTS, nsight
from .faults import KINDS
from .launch import Execution
from .session import Session, executing

SAMPLE = 12
"""Blocks of each launch to execute of a case that is for benchmarks."""


def execute_case(
    spec: OpSpec,
    case: Case,
    *,
    arch: int,
    dtype: torch.dtype,
    direction: str = "both",
    sample: int | None = None,
    function: Callable[..., Any] | None = None,
    convert: Callable[[Inputs], Inputs] = dict,
) -> Session:
    """Run a case forward, and backward where asked, with costs counted and faults collected.

    Args:
        spec, case, dtype: what is computed.
        arch, sample: as in `run`. Where blocks are sampled, the largest inputs are zeros.
        direction: "fwd", "bwd" or "both".
        function: another implementation of the op (default: ours).
        convert: makes its inputs from the op's.
    """
    function = function or partial(spec.op, impl="triton")
    with nullcontext() if sample is None else zeros_beyond(LARGEST_INPUT):
        inputs = convert(spec.make_inputs(case, dtype, torch.device("cpu"), 0))
    leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
    for leaf in leaves:
        leaf.requires_grad_(direction != "fwd")
    with executing(arch=arch, collect=KINDS, costs=True, sample=sample) as session:
        out = function(**inputs)
        if direction == "fwd":
            return session
        torch_ops = len(session.torch_ops)
        roots = [x for x in ([out] if isinstance(out, torch.Tensor) else out) if x.requires_grad]
        upstream = [upstream_of(x, sample) for x in roots]
        del session.torch_ops[torch_ops:]
        if direction == "bwd":
            session.executions.clear()
            session.torch_ops.clear()
        if roots:
            torch.autograd.grad(roots, leaves, upstream, allow_unused=True)
    return session


LARGE = 1 << 26
"""Bytes from which on gradients that few blocks read are not written first."""
LARGEST_INPUT = 1 << 29
"""Bytes beyond which inputs that few blocks read are not drawn."""


def upstream_of(x: torch.Tensor, sample: int | None) -> torch.Tensor:
    """Ones; where blocks are sampled and values mean nothing, zeros without memory of their own."""
    if sample is None or x.nbytes < LARGE:
        return torch.ones_like(x)
    return untouched_zeros(*x.shape, dtype=x.dtype)


def report(done: Execution, bounds: Bounds) -> str:
    """A launch in a few lines."""
    counts, machine = bounds.counts, bounds.machine
    sectors, wavefronts = ratio(counts, "sectors"), ratio(counts, "wavefronts")
    diverged = counts["divergent_instructions"] / (counts["ptx_instructions"] or 1)
    limits = "  ".join(f"{name} {us:.2f}" for name, us in bounds.us.items())
    conflicts = sum(counts.get(name, 0) for name in CONFLICTS)
    flops = sum(x for name, x in counts.items() if name.startswith("matrix_flops_"))
    ptx = counts["ptx_instructions"]
    classes = sorted(
        ((x, name.removeprefix("class_")) for name, x in counts.items() if name[:6] == "class_"),
        reverse=True,
    )
    lines = [
        f"{done.kernel}  grid {done.grid[0]}  {done.program.threads} threads"
        + (f"  SAMPLED: 1 block in {bounds.factor:.4g}" if bounds.factor > 1 else ""),
        f"  at least {bounds.largest:.2f} us, by {bounds.binding}   ({limits})",
        f"  global: {requests(counts, 'global'):,.0f} requests, sectors {sectors:.2f} of the"
        f" fewest; L2 {counts['l2_bytes']:,.0f} bytes, DRAM {counts['dram_bytes']:,.0f} bytes",
        f"  shared: {requests(counts, 'shared'):,.0f} requests, wavefronts"
        f" {wavefronts:.2f} of the fewest, {conflicts:,.0f} bank conflicts",
        f"  warp instructions {counts['instructions']:,.0f} of the machine code"
        f" ({machine.exact_share if machine else 0:.0%} on lines that match exactly),"
        f" {ptx:,.0f} of the PTX",
        f"  work {work_share(counts):.0%} of the PTX's; "
        + ", ".join(f"{name} {x / (ptx or 1):.0%}" for x, name in classes),
        f"  matrix FLOPs {flops:,.0f}; diverged {diverged:.1%};"
        f" longest chain {counts['longest_chain']:,.0f} instructions of a block",
    ]
    lines += [f"  FAULT {fault}" for fault in done.faults]
    return "\n".join(lines)


def case_report(session: Session, device: Device, by_line: bool = False) -> str:
    """All launches of a case, what torch computes in between, and their sum."""
    parts, total = [], 0.0
    for done in session.executions:
        bounds = bounds_of(done, device)
        total += bounds.largest
        parts.append(report(done, bounds))
        if by_line:
            parts.append(by_source(done, bounds))
    others = [bounds_of_torch_op(op, device) for op in session.torch_ops]
    if others:
        names = Counter(bounds.kernel for bounds in others)
        shown = ", ".join(f"{name} {count}" for name, count in names.most_common())
        us = sum(bounds.largest for bounds in others)
        total += us
        parts.append(f"{len(others)} operators of torch, at least {us:.2f} us: {shown}")
    count = len(session.executions) + len(others)
    parts.append(f"{count} launches, at least {total:.2f} us in sum: a bound, not a time")
    return "\n".join(parts)


def by_source(done: Execution, bounds: Bounds, most: int = 20) -> str:
    """The source lines that issue most machine instructions, hottest first."""
    machine = bounds.machine
    lines: Counter[str] = Counter(machine.by_line if machine else {})
    total = sum(lines.values()) or 1
    rows = [
        f"  {count / total:5.1%}  {count * bounds.factor:14,.0f}  {line or '(no line)'}"
        for line, count in lines.most_common(most)
    ]
    return "\n".join([f"{done.kernel}: warp instructions by source line", *rows])


def _launch_values(done: Execution, bounds: Bounds) -> dict[str, Any]:
    """A launch as plain values."""
    return {
        "kernel": done.kernel,
        "grid": list(done.grid),
        "threads": done.program.threads,
        "shared_bytes": done.shared_bytes,
        "us": bounds.us,
        "binding": bounds.binding,
        "factor": bounds.factor,
        "counts": bounds.counts,
        "nsight": nsight(bounds.counts),
        "machine": asdict(bounds.machine) if bounds.machine else None,
        "faults": [str(fault) for fault in done.faults],
    }


def session_values(session: Session, device: Device, floor_us: float) -> dict[str, Any]:
    """All launches and operators of torch as plain values."""
    found = [(done, bounds_of(done, device)) for done in session.executions]
    others = [bounds_of_torch_op(op, device) for op in session.torch_ops]
    return {
        "device": device.name,
        "dram_floor_us": floor_us,
        "us": sum(x.largest for x in (*(bounds for _, bounds in found), *others)),
        "launches": [_launch_values(*each) for each in found],
        "torch_ops": [{"name": x.kernel, "us": x.us, "counts": x.counts} for x in others],
    }
