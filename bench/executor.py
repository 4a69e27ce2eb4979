"""Time the execution of compiled kernels (`stlm_kernels.ptx`) beside triton's interpreter.

Both run the same kernels over the same tensors: each op's smoke cases in bf16, forward and
backward, once compiled. Seconds are those of the CPU, so other processes disturb little; each side
has a process of its own, whose largest memory is shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from stlm_kernels import terminal
from stlm_kernels.registry import OPS
from stlm_kernels.spec import Case, OpSpec

from .harness import environment
from .harness.results import Result, add_result_options, command_line, result_path

Record = dict[str, Any]
WAYS = {"compiled": "0", "interpreted": "1"}
"""Each side, and what triton is told with it."""
RUNS = 3
ACCEPTED = ("lanes", "proxy")
"""Faults that the compiled lane accepts by kernel; here they would end the timing."""


def run_once(spec: OpSpec, case: Case, way: str) -> float:
    """CPU seconds of the kernels of a case, forward and backward."""
    inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), 0)
    leaves = [inputs[name] for name in spec.grad_args if inputs.get(name) is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    began = time.process_time()
    with _executing(way):
        out = spec.op(**inputs, impl="triton")
        roots = [x for x in ([out] if isinstance(out, torch.Tensor) else out) if x.requires_grad]
        if roots:
            upstream = [torch.ones_like(x) for x in roots]
            torch.autograd.grad(roots, leaves, upstream, allow_unused=True)
    return time.process_time() - began


def _executing(way: str) -> contextlib.AbstractContextManager[Any]:
    if way == "interpreted":
        return contextlib.nullcontext()
    from stlm_kernels import ptx

    return ptx.executing(collect=ACCEPTED)


def side(ops: Sequence[str], way: str) -> list[Record]:
    """Run the smoke cases one way, in this process."""
    torch.set_num_threads(1)
    found = []
    for spec in (OPS[name] for name in ops):
        for case in spec.tagged("smoke"):
            run_once(spec, case, way)  # compiles
            seconds = [run_once(spec, case, way) for _ in range(RUNS)]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found.append(
                {"op": spec.name, "case": case.name, "seconds": seconds, "peak_bytes": peak}
            )
    return found


def other_process(ops: Sequence[str], way: str) -> list[Record]:
    """Run `side` where triton's kernels are decorated the one way or the other."""
    run = f"json.dumps(side({list(ops)!r}, {way!r}))"
    code = f"import json; from bench.executor import side; print({run})"
    environment_of = {**os.environ, "TRITON_INTERPRET": WAYS[way]}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment_of, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: list[Record] = json.loads(done.stdout.splitlines()[-1])
    return found


def joined(compiled: Sequence[Record], interpreted: Sequence[Record]) -> list[Record]:
    """Both sides of each case."""
    return [
        {
            "op": ours["op"],
            "case": ours["case"],
            "compiled_s": ours["seconds"],
            "interpreted_s": other["seconds"],
            "times_faster": min(other["seconds"]) / min(ours["seconds"]),
        }
        for ours, other in zip(compiled, interpreted, strict=True)
    ]


def line(row: Record) -> str:
    """A row of the table."""
    name = f"{row['op']} {row['case']}"
    return (
        f"{min(row['compiled_s']):8.3f} s of a core, the interpreter"
        f" {min(row['interpreted_s']):.3f}, {row['times_faster']:5.1f} times faster  {name}"
    )


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = terminal.argument_parser("bench.executor", __doc__)
    known = [name for name, spec in OPS.items() if spec.kernels]
    parser.add_argument("ops", nargs="*", choices=[[], *known], metavar="op")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "executor", parser)
    about = environment.software(torch.device("cpu"), options.commit)
    sides = {way: other_process(options.ops or known, way) for way in WAYS}
    rows = joined(sides["compiled"], sides["interpreted"])
    middle = statistics.median(min(row["compiled_s"]) for row in rows)
    faster = statistics.median(row["times_faster"] for row in rows)
    peak = max(x["peak_bytes"] for x in sides["compiled"]) / 2**20
    total = sum(min(x["interpreted_s"]) for x in rows) / sum(min(x["compiled_s"]) for x in rows)
    summary = [line(row) for row in rows]
    summary.append(
        f"median {middle:.3f} s of a core a case, {faster:.1f} times faster in the median and"
        f" {total:.1f} in sum; largest memory {peak:,.0f} MiB"
    )
    print("\n".join(summary))
    settings = {"runs": RUNS, "peak_mib": round(peak)}
    Result(command_line("bench.executor", arguments), about, rows, summary, settings).write(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
