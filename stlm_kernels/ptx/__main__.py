"""`python -m stlm_kernels.ptx OP`: run an op's compiled kernels here; checks, counts and bounds.

Nothing of this needs a GPU. Bounds are lower bounds of time, not times.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .. import terminal
from ..registry import OPS
from ..spec import Case, Inputs, OpSpec
from .bounds import Bounds, Device, bounds_of, ratio
from .count import NAMES
from .faults import KINDS
from .launch import Execution
from .session import Session, executing

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        arch, sample: as in `run`.
        direction: "fwd", "bwd" or "both".
        function: another implementation of the op (default: ours).
        convert: makes its inputs from the op's.
    """
    function = function or partial(spec.op, impl="triton")
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
        upstream = [torch.ones_like(x) for x in roots]
        del session.torch_ops[torch_ops:]
        if direction == "bwd":
            session.executions.clear()
            session.torch_ops.clear()
        if roots:
            torch.autograd.grad(roots, leaves, upstream, allow_unused=True)
    return session


def report(done: Execution, bounds: Bounds) -> str:
    """A launch in a few lines."""
    counts, machine = bounds.counts, bounds.machine
    limits = "  ".join(f"{name} {us:.2f}" for name, us in bounds.us.items())
    lines = [
        f"{done.kernel}  grid {done.grid[0]}  {done.program.threads} threads"
        + (f"  sampled 1 in {bounds.factor:.3g} blocks" if bounds.factor > 1 else ""),
        f"  at least {bounds.largest:.2f} us, by {bounds.binding}   ({limits})",
        f"  sectors {ratio(counts, 'sectors'):.2f} of the ideal, wavefronts"
        f" {ratio(counts, 'wavefronts'):.2f}; L2 {counts['l2_bytes']:,.0f} bytes,"
        f" DRAM {counts['dram_bytes']:,.0f} bytes",
        f"  warp instructions {counts['instructions']:,.0f} of the machine code"
        f" ({machine.exact_share if machine else 0:.0%} on lines that match exactly),"
        f" {counts['ptx_instructions']:,.0f} of the PTX",
    ]
    lines += [f"  FAULT {fault}" for fault in done.faults]
    return "\n".join(lines)


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


def as_values(done: Execution, bounds: Bounds) -> dict[str, Any]:
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
        "nsight": {NAMES[name]: bounds.counts[name] for name in NAMES if name in bounds.counts},
        "machine": asdict(bounds.machine) if bounds.machine else None,
        "faults": [str(fault) for fault in done.faults],
    }


@terminal.command(on_closed_pipe=1)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("stlm_kernels.ptx", __doc__)
    with_kernels = [name for name, spec in OPS.items() if spec.kernels]
    parser.add_argument("op", choices=with_kernels)
    parser.add_argument("--case", help="part of a case's name (default: the first smoke case)")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pass", dest="direction", choices=("fwd", "bwd", "both"), default="both")
    parser.add_argument("--device", default="h200", help="whose rates make the bounds")
    parser.add_argument("--sample", type=int, help="execute so many blocks of each launch")
    parser.add_argument("--source", action="store_true", help="instructions by source line")
    parser.add_argument("--json", action="store_true", help="all counts as JSON")
    options = parser.parse_args(arguments)
    spec = OPS[options.op]
    named = [case for case in spec.cases if options.case is not None and options.case in case.name]
    if options.case is not None and not named:
        parser.error(
            f"no case named {options.case}; cases: {', '.join(c.name for c in spec.cases)}"
        )
    case = named[0] if named else spec.tagged("smoke")[0]
    try:
        device = Device.load(options.device)
    except ValueError as error:
        parser.error(str(error))
    session = execute_case(
        spec, case, arch=options.arch, dtype=DTYPES[options.dtype], direction=options.direction,
        sample=options.sample,
    )  # fmt: skip
    found = [(done, bounds_of(done, device)) for done in session.executions]
    if options.json:
        print(json.dumps([as_values(*each) for each in found], indent=1))
    else:
        print(
            f"{spec.name} {case.name}, {options.dtype}, sm_{options.arch}, rates of {device.name}"
        )
        for each in found:
            print(report(*each))
            if options.source:
                print(by_source(*each))
        total = sum(bounds.largest for _, bounds in found)
        print(f"{len(found)} launches, at least {total:.2f} us in sum: a bound, not a time")
    return 1 if any(done.faults for done, _ in found) else 0


if __name__ == "__main__":
    sys.exit(main())
