"""Compare the speed of training steps with another commit, by turns.

A process for each commit trains the same model, the preset as the other commit has it, on the same
windows, a step in turn. CPU time is that of all threads: on a busy machine compare it, with one
thread; on a quiet one the seconds of the clock count. The peak of memory is that of the process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from stlm_kernels import terminal
from stlm_models.training.precision import faster_precision
from stlm_models.training.trainer import PRECISIONS

from .harness import environment, turns
from .harness.commandline import positive
from .harness.commits import ROOT, Side, library_of
from .harness.results import Record, Result, add_result_options, command_line, result_path

FOLDERS = ("stlm_kernels", "stlm_models")


def measure(other: Side, here: Side, settings: Record, steps: int) -> list[Record]:
    """Train by turns; return the other's times and ours."""
    config = other.ask(json.dumps({**settings, "config": None}))
    here.ask(json.dumps({**settings, "config": config}))
    return turns.by_turns((other, here), steps)


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
        lines = [preset, *map(turns.line, found), turns.gain(*found)]
        print(*lines, sep="\n", flush=True)
        rows += found
        summary += lines
    command = command_line("bench.step_speed", arguments)
    Result(command, about, rows, summary, settings).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
