"""Compare executing compiled kernels (`stlm_kernels.ptx`) with triton's interpreter.

Both run the same kernels over the same tensors, by turns, each in a process of its own: each op's
smoke cases, forward and backward, once compiled. The dtype is fp16: the interpreter's bf16 is not
the hardware's, and kernels that pair bf16 numbers do not run there. Times are seconds of one core
(CPU time of a process with one thread), so other processes disturb little.
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
from collections.abc import Iterator, Sequence
from types import TracebackType
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
TURNS = 3
DTYPE = torch.float16
AIM = 5
"""Times faster than the interpreter that the executor should be."""
ACCEPTED = ("lanes", "proxy")
"""Faults that the compiled lane accepts by kernel; here they would end the timing."""


def run_once(spec: OpSpec, case: Case, way: str) -> float:
    """CPU seconds of the kernels of a case, forward and backward."""
    inputs = spec.make_inputs(case, DTYPE, torch.device("cpu"), 0)
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


def serve(way: str) -> None:
    """Run the smoke cases that standard input names, `op index` a line, and write what they took.

    The first run of a case, which compiles, does not count. With the seconds comes the largest
    memory of this process so far, in MiB.
    """
    torch.set_num_threads(1)
    compiled: set[str] = set()
    for line in sys.stdin:
        name, index = line.split()
        spec = OPS[name]
        case = spec.tagged("smoke")[int(index)]
        if line not in compiled:
            run_once(spec, case, way)
            compiled.add(line)
        seconds = run_once(spec, case, way)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": round(peak)}), flush=True)


class Side:
    """A process in which triton's kernels are compiled, or one in which they are interpreted."""

    def __init__(self, way: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-c",
                f"from bench.executor import serve; serve({way!r})",
            ],
            # numpy's products take a thread for each core otherwise.
            env={**os.environ, "TRITON_INTERPRET": WAYS[way], "OMP_NUM_THREADS": "1"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.peak_mib = 0

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def seconds(self, op: str, index: int) -> float:
        """CPU seconds of one run of a smoke case.

        Raises:
            RuntimeError: the process ended; its message is on standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(op, index, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{op}: the run of smoke case {index} ended without a time")
        found = json.loads(answer)
        self.peak_mib = found["peak_mib"]
        return float(found["seconds"])


def measure(ops: Sequence[str], compiled: Side, interpreted: Side) -> Iterator[Record]:
    """Time each smoke case on both sides, by turns."""
    for name in ops:
        for index, case in enumerate(OPS[name].tagged("smoke")):
            turns = [
                (compiled.seconds(name, index), interpreted.seconds(name, index))
                for _ in range(TURNS)
            ]
            ours, others = ([turn[i] for turn in turns] for i in (0, 1))
            yield {
                "op": name,
                "case": case.name,
                "compiled_s": ours,
                "interpreted_s": others,
                "times_faster": min(others) / min(ours),
            }


def line(row: Record) -> str:
    """A row of the table."""
    return (
        f"{min(row['compiled_s']):8.3f} s of a core, the interpreter"
        f" {min(row['interpreted_s']):.3f}, {row['times_faster']:5.1f} times faster "
        f" {row['op']} {row['case']}"
    )


def conclusion(rows: Sequence[Record], peak_mib: int) -> str:
    """The medians of all cases, and how many fall short of the aim."""
    middle = statistics.median(min(row["compiled_s"]) for row in rows)
    faster = statistics.median(row["times_faster"] for row in rows)
    total = sum(min(x["interpreted_s"]) for x in rows) / sum(min(x["compiled_s"]) for x in rows)
    short = sum(row["times_faster"] < AIM for row in rows)
    return (
        f"median {middle:.3f} s of a core a case, {faster:.1f} times faster in the median and"
        f" {total:.1f} in sum; {short} of {len(rows)} cases are less than {AIM} times faster;"
        f" largest memory {peak_mib:,} MiB"
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
    rows: list[Record] = []
    with Side("compiled") as compiled, Side("interpreted") as interpreted:
        for row in measure(options.ops or known, compiled, interpreted):
            rows.append(row)
            print(line(row), flush=True)
    summary = [*map(line, rows), conclusion(rows, compiled.peak_mib)]
    print(summary[-1])
    settings = {"turns": TURNS, "dtype": "float16", "peak_mib": compiled.peak_mib}
    Result(command_line("bench.executor", arguments), about, rows, summary, settings).write(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
