"""Compare the speed of training steps with another commit, by turns.

A process for each commit trains the same model, the preset as the other commit has it, on the same
windows, a step in turn. CPU time is that of all threads: on a busy machine compare it, with one
thread; on a quiet one the seconds of the clock count. The peak of memory is that of the process.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from stlm_kernels import terminal
from stlm_models.training.precision import faster_precision
from stlm_models.training.trainer import PRECISIONS

from .harness import environment
from .harness.commandline import positive
from .harness.commits import ROOT, Side, library_of
from .harness.results import Record, Result, add_result_options, command_line, result_path

FOLDERS = ("stlm_kernels", "stlm_models")


def measure(other: Side, here: Side, settings: Record, steps: int) -> list[Record]:
    """Train by turns; return the other's times and ours. A first step of each is not timed."""
    config = other.ask(json.dumps({**settings, "config": None}))
    here.ask(json.dumps({**settings, "config": config}))
    turns = [(other.ask("step"), here.ask("step")) for _ in range(steps + 1)]
    return [
        {
            "bytes_per_second": of_side[0]["n_bytes"] / median(of_side, "seconds"),
            "bytes_per_cpu_second": of_side[0]["n_bytes"] / median(of_side, "cpu_seconds"),
            "peak_bytes": side.ask("peak"),
            **{key: [step[key] for step in of_side] for key in ("seconds", "cpu_seconds", "loss")},
        }
        for side, of_side in zip((other, here), zip(*turns, strict=True), strict=True)
    ]


def median(steps: Sequence[Record], key: str) -> float:
    return statistics.median(step[key] for step in steps[1:])


def line(row: Record) -> str:
    return (
        f"  {row['commit']:<12} {row['bytes_per_second']:9,.0f} bytes/s"
        f" {row['bytes_per_cpu_second']:9,.0f} bytes/s of CPU time"
        f" {row['peak_bytes'] / 2**20:8,.0f} MiB"
    )


def gain(other: Record, here: Record) -> str:
    ratios = (here[key] / other[key] for key in ("bytes_per_second", "bytes_per_cpu_second"))
    faster, faster_cpu = ratios
    smaller = here["peak_bytes"] / other["peak_bytes"]
    return (
        f"  {faster:.2f} times the speed, {faster_cpu:.2f} by CPU time, {smaller:.2f} of the peak"
    )


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.step_speed", __doc__)
    parser.add_argument(
        "presets", nargs="*", default=["demo"], metavar="preset", help="(default: demo)"
    )
    parser.add_argument("--against", default="HEAD", help="commit to compare with (default: HEAD)")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="windows in a step (default: 8)"
    )
    parser.add_argument("--steps", type=positive, default=5, help="timed steps (default: 5)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        help="threads of torch (default: its own choice)",
    )
    parser.add_argument(
        "--precision", choices=sorted(PRECISIONS), help="default: bf16 where the CPU has it"
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    path = result_path(options.json, "step-speed", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    settings = {
        "batch_size": options.batch_size,
        "precision": options.precision or faster_precision().name,
        "threads": options.threads,
    }
    print(environment.header(about, None), flush=True)
    rows: list[Record] = []
    summary = [", ".join(f"{key} {value}" for key, value in settings.items())]
    for preset in options.presets:
        with ExitStack() as stack:
            folder = stack.enter_context(library_of(options.against, *FOLDERS))
            other, here = (stack.enter_context(Side(x, "step_calls")) for x in (folder, ROOT))
            found = measure(other, here, {**settings, "preset": preset}, options.steps)
        names = (options.against, "here")
        found = [
            {"preset": preset, "commit": name, **row}
            for name, row in zip(names, found, strict=True)
        ]
        lines = [preset, *map(line, found), gain(*found)]
        print(*lines, sep="\n", flush=True)
        rows += found
        summary += lines
    command = command_line("bench.step_speed", arguments)
    Result(command, about, rows, summary, settings).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
