"""Time the Python of a call before its first launch, beside another commit of the library.

No GPU is needed: launches reach no device. Two processes take turns, one with the library of each
commit, and measure CPU time of their thread, so that a busy machine disturbs little; the least of
each turn counts. What triton needs to bind a launch's arguments comes on top.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from stlm_kernels import terminal

from .harness import environment
from .harness.commandline import positive
from .harness.commits import ROOT, Side, library_of
from .harness.results import Result, add_result_options, command_line, result_path

AIM_US = 30.0
"""What a call may take before its first launch on a quiet machine."""
Turn = dict[str, list[int]]


def measure(sides: Sequence[Side], turns: int) -> list[dict[str, list[float]]]:
    """Return of each side and op the least microseconds of each turn; sides take turns."""
    found: list[dict[str, list[float]]] = [{} for _ in sides]
    for _ in range(turns):
        for side, least in zip(sides, found, strict=True):
            for op, nanoseconds in side.ask("turn").items():
                least.setdefault(op, []).append(min(nanoseconds) / 1e3)
    return found


def row(op: str, ours: list[float], other: list[float]) -> dict[str, object]:
    """Join both sides of an op; medians over the turns."""
    us, other_us = statistics.median(ours), statistics.median(other)
    return {"op": op, "us": us, "other_us": other_us, "ratio": us / other_us}


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.host", __doc__)
    parser.add_argument("--against", default="HEAD", help="commit to compare with (default: HEAD)")
    parser.add_argument("--turns", type=positive, default=9, help="turns of each (default: 9)")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "host", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    with ExitStack() as stack:
        other = stack.enter_context(library_of(options.against, "stlm_kernels"))
        sides = [stack.enter_context(Side(folder, "host_calls")) for folder in (ROOT, other)]
        ours, others = measure(sides, options.turns)
    rows = [row(op, ours[op], others[op]) for op in ours]
    summary = [
        f"{x['op']:<22} {x['us']:6.1f} us, {options.against} {x['other_us']:6.1f} us,"
        f" {x['ratio']:5.2f}x"
        for x in rows
    ]
    print(*summary, sep="\n")
    command = command_line("bench.host", arguments)
    Result(command, about, rows, summary, {"aim_us": AIM_US}).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
