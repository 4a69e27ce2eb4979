"""Compare the speed of generation with another commit, by turns.

A process for each commit writes with the same model, the preset as the other commit has it,
untrained, so that all bytes are as likely and patches end about as often as in text: all prompts
are continued in a turn, by bytes drawn at temperature 1. CPU time is that of all threads: on a busy
machine compare it, with one thread; on a quiet one the seconds of the clock count. The peak of
memory is that of the process.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch

from stlm_kernels import terminal
from stlm_models.presets import PRESETS

from .harness import environment, turns
from .harness.commandline import positive
from .harness.commits import ROOT, Side, library_of
from .harness.results import Record, Result, add_result_options, command_line, result_path

FOLDERS = ("stlm_kernels", "stlm_models")
BATCHES = (1, 32)


def measure(other: Side, here: Side, llama: Side | None, given: Record, steps: int) -> list[Record]:
    """Write by turns; return the other's times, ours and the Llama's."""
    config = other.ask(json.dumps({**given, "config": None}))
    here.ask(json.dumps({**given, "config": config}))
    sides = [other, here]
    if llama is not None:
        llama.ask(json.dumps({**given, "config": asdict(PRESETS[f"{given['preset']}-flat"])}))
        sides.append(llama)
    return turns.by_turns(sides, steps)


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


@terminal.command()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = terminal.argument_parser("bench.generation_speed", __doc__)
    parser.add_argument(
        "presets", nargs="*", default=["demo"], metavar="preset", help="(default: demo)"
    )
    parser.add_argument("--against", default="HEAD", help="commit to compare with (default: HEAD)")
    parser.add_argument(
        "--batch-size", type=positive, nargs="+", default=BATCHES, help="prompts (default: 1 32)"
    )
    parser.add_argument(
        "--new-bytes", type=positive, default=512, help="bytes for each prompt (default: 512)"
    )
    parser.add_argument("--steps", type=positive, default=9, help="timed turns (default: 9)")
    parser.add_argument("--threads", type=positive, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--llama",
        action="store_true",
        help="beside transformers' Llama (eager) in the shape of the preset-flat",
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    if options.llama and not has_transformers():
        parser.error("--llama: expected transformers installed (pip install '.[hf]'), found none")
    path = result_path(options.json, "generation-speed", parser)
    about = environment.describe(torch.device("cpu"), options.commit)
    settings = {"new_bytes": options.new_bytes, "threads": options.threads}
    print(environment.header(about, None), flush=True)
    rows: list[Record] = []
    summary = [", ".join(f"{key} {value}" for key, value in settings.items())]
    for preset, batch_size in ((x, y) for x in options.presets for y in options.batch_size):
        with ExitStack() as stack:
            folder = stack.enter_context(library_of(options.against, *FOLDERS))
            calls = [(folder, "generation_calls"), (ROOT, "generation_calls")]
            calls += [(ROOT, "llama_calls")] if options.llama else []
            other, here, *llama = (stack.enter_context(Side(*each)) for each in calls)
            given = {**settings, "preset": preset, "batch_size": batch_size}
            found = measure(other, here, llama[0] if llama else None, given, options.steps)
        names = (options.against, "here", "Llama")
        found = [
            {"preset": preset, "batch_size": batch_size, "commit": name, **row}
            for name, row in zip(names, found, strict=False)
        ]
        lines = [f"{preset}, batch {batch_size}", *map(turns.line, found), turns.gain(*found[:2])]
        lines += [f"  and of the Llama:{turns.gain(row, found[1])}" for row in found[2:]]
        print(*lines, sep="\n", flush=True)
        rows += found
        summary += lines
    command = command_line("bench.generation_speed", arguments)
    Result(command, about, rows, summary, settings).write(path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
